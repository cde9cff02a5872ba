"""Checks the keys: the API key for `/v1`, the admin key for the registry, the metrics key."""

import re
import secrets
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import SecretStr
from starlette.datastructures import Headers

from server.api.context import AnyTimeContext, Context
from server.api.errors import ApiError
from server.config import Settings
from server.hosts import is_loopback, named_host

# Headers in which proxies name the client that they speak for. The pattern is broad on purpose: a
# client that is taken for a proxy by mistake only has to give the admin key.
_FORWARDING: Final = re.compile(
    r"forwarded|via|cdn-loop|x-forwarded.*|x-original-.*|x-envoy-.*|x-proxyuser-.*|cf-.*"
    r"|(?:.*-)?(?:client|connecting|real|user|remote)-?ip"
)


async def require_api_key(request: Request, context: Context) -> None:
    """Raise a 401 for a request without the API key or the admin key, if an API key is set."""
    settings = context.settings
    if settings.api_key is None:
        return
    presented = _presented_key(request)
    # Both keys are compared in any case, so that the time does not tell which of them matched.
    if not (_equal(presented, settings.api_key) | _equal(presented, settings.admin_key)):
        raise _unauthorized(presented)


async def require_admin(request: Request, context: Context) -> None:
    """Raise a 401 or 403 for a change of the registry by anybody but its admin.

    If there is no admin key, the user of this machine is the admin. A request counts as that user's
    if the server is bound to loopback and has no API key, and if the request has no header of a
    proxy, names a loopback host, and does not come from another site's page.
    """
    settings = context.settings
    if settings.admin_key is not None:
        presented = _presented_key(request)
        if _equal(presented, settings.admin_key):
            return
        if _equal(presented, settings.api_key):
            raise _forbidden("Uploading and deleting need the admin key; this is the API key.")
        raise _unauthorized(presented)
    obstacle = _why_not_local(request.headers, settings)
    if obstacle is not None:
        raise _forbidden(
            f"Uploading and deleting need an admin key here: {obstacle}. "
            "Start the server with --admin-key-file or --admin-key, and send that key."
        )


def _why_not_local(headers: Headers, settings: Settings) -> str | None:
    """Say why a request may come from somebody else than this machine's user, or return None."""
    if not settings.binds_loopback:
        return "this server is not bound to a loopback address"
    if settings.api_key is not None:
        return "this server has an API key, so others than its admin use it"
    names = {name: name.lower().replace("_", "-") for name in headers}
    proxied = next((name for name in names if _FORWARDING.fullmatch(names[name])), None)
    if proxied is not None:
        return f"the header {proxied[:50]} says that the request came through a proxy"
    host = named_host(headers.get("host", ""))
    if host is None or not is_loopback(host):
        return "the request's Host header is not localhost or a loopback address"
    if not _is_same_origin(headers):
        return "the request comes from another site's page"
    return None


async def require_metrics_key(request: Request, context: AnyTimeContext) -> None:
    """Raise a 401 for a request without the metrics or admin key, if a metrics key is set."""
    settings = context.settings
    if settings.metrics_key is None:
        return
    presented = _presented_key(request)
    if not (_equal(presented, settings.metrics_key) | _equal(presented, settings.admin_key)):
        raise _unauthorized(presented)


def _presented_key(request: Request) -> bytes | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" and key.strip() else None


def _equal(presented: bytes | None, key: SecretStr | None) -> bool:
    if presented is None or key is None:
        return False
    return secrets.compare_digest(presented, key.get_secret_value().encode())


def _is_same_origin(headers: Headers) -> bool:
    """Tell whether the request has no Origin header, or one that names its own Host."""
    try:
        pages = {urlsplit(origin).netloc for origin in headers.getlist("origin")}
    except ValueError:
        return False
    return pages <= {headers.get("host")}


def _unauthorized(presented: bytes | None) -> ApiError:
    message = (
        "You didn't provide a key: send it as the header Authorization: Bearer <key>."
        if presented is None
        else "Incorrect key provided."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="admin_key_required")
