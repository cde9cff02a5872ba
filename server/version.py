"""The installed version of steerserve."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return the distribution's version, `unknown` if the sources run without being installed."""
    try:
        return version("steerserve")
    except PackageNotFoundError:
        return "unknown"
