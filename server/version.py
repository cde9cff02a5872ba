"""Which steerserve this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The distribution's version; `unknown` where the sources run without being installed."""
    try:
        return version("steerserve")
    except PackageNotFoundError:
        return "unknown"
