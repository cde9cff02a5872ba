"""Makes a copy of an artifact that has other default settings."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import safe_open

from interventions.artifact import read_artifact, write_artifact
from interventions.header import ArtifactError
from interventions.manifest import ManifestError, parse_manifest
from server.evaluating import EvaluationError


def write_with_defaults(path: Path, data: bytes, defaults: Mapping[str, JsonValue]) -> str:
    """Write a copy of an artifact with other defaults, and return the copy's digest.

    Args:
        path: the file to write; its folder must exist.
        data: the artifact's bytes.
        defaults: all settings of the artifact's kind.

    Raises:
        EvaluationError: the bytes are no artifact, or its manifest does not take the defaults.
        OSError: the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original.safetensors"
        original.write_bytes(data)
        try:
            artifact = read_artifact(original)
            fields = artifact.manifest.model_dump(mode="json")
            manifest = parse_manifest(json.dumps({**fields, "defaults": dict(defaults)}))
            return write_artifact(path, manifest, artifact.parameters, _dtype(original))
        except (ArtifactError, ManifestError) as error:
            raise EvaluationError(f"{path} cannot be written: {error}") from error


def _dtype(path: Path) -> torch.dtype:
    """Return the tensors' type, so that the copy is as large; float32 if they have several."""
    with safe_open(path, framework="pt", device="cpu") as file:
        types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no mapping
    found: torch.dtype = types.pop()
    return torch.float32 if types else found
