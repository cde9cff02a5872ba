"""Parses the names of hosts and origins, as requests and operators write them."""

import ipaddress
import re
from typing import Final

ANY_ORIGIN: Final = "*"
MAX_PORT: Final = 65535

_HOST: Final = (
    r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(?P<port>[0-9]{0,5}))?"
)
_HOST_PATTERN: Final = re.compile(_HOST, re.IGNORECASE | re.ASCII)
_ORIGIN_PATTERN: Final = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://{_HOST}", re.IGNORECASE | re.ASCII
)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}


def named_host(host: str) -> str | None:
    """Return the name in a Host header: lower case, without port, brackets or a last dot.

    An IPv6 address is compressed.

    Returns:
        The name, or None if the header is not `name`, `name:port`, `[IPv6 address]` or
        `[IPv6 address]:port`.
    """
    match = _HOST_PATTERN.fullmatch(host)
    return None if match is None else _canonical(match["name"])


def is_loopback(name: str) -> bool:
    """Return whether a name, as `named_host` gives it, can only mean the machine it is used on."""
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_host(value: str) -> str:
    """Check a host that an operator allows; return it as `named_host` does.

    Raises:
        ValueError: the host is neither a name nor an address, or has a port.
    """
    match = _HOST_PATTERN.fullmatch(f"[{value}]" if _is_ipv6(value) else value)
    name = None if match is None or match["port"] is not None else _canonical(match["name"])
    if name is None:
        raise ValueError(
            f"{value[:100]!r} is not a host to allow: give a name or an address without a scheme "
            "and without a port, such as llm.example.org (every port of it is allowed then)"
        )
    return name


def check_origin(value: str) -> str:
    """Check an origin that an operator allows; return it as browsers write it, or `*`.

    Raises:
        ValueError: the origin is neither `*` nor `scheme://host[:port]`.
    """
    if value == ANY_ORIGIN:
        return value
    match = _ORIGIN_PATTERN.fullmatch(value)
    name = None if match is None else _canonical(match["name"])
    port = "" if match is None else match["port"]
    if match is None or name is None or port == "" or int(port or 0) > MAX_PORT:
        raise ValueError(
            f"{value[:100]!r} is not an origin: give scheme://host or scheme://host:port and "
            "nothing behind it, such as https://chat.example.org, or * for every origin"
        )
    scheme = match["scheme"].lower()
    host = f"[{name}]" if ":" in name else name
    # Browsers leave out the default port of the scheme.
    shown = "" if port in (None, _DEFAULT_PORTS.get(scheme)) else f":{int(port)}"
    return f"{scheme}://{host}{shown}"


def _canonical(name: str) -> str | None:
    """Return the name in lower case, without brackets or a last dot, an IPv6 address compressed.

    Returns None if the brackets hold no IPv6 address.
    """
    name = name.lower()
    if not name.startswith("["):
        return name.removesuffix(".")
    address = name[1:-1]
    return ipaddress.ip_address(address).compressed if _is_ipv6(address) else None


def _is_ipv6(value: str) -> bool:
    try:
        return ipaddress.ip_address(value).version == 6
    except ValueError:
        return False
