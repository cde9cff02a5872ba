"""The artifacts that come with the package, for the embedded model."""

from pathlib import Path


def bundled_artifacts() -> tuple[Path, ...]:
    """The paths of the artifacts in this folder, sorted by file name."""
    return tuple(sorted(Path(__file__).parent.glob("*.safetensors")))
