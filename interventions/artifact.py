"""Reads artifacts, with every check, and writes them. An artifact is one safetensors file."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interventions.header import (
    DEFAULT_LIMITS,
    ArtifactError,
    ArtifactLimits,
    Header,
    UnreadableArtifactError,
    read_header,
)
from interventions.layout import (
    AffineShapes,
    Shapes,
    check_layout,
    to_tensors,
)
from interventions.manifest import Manifest, ManifestError, manifest_text, parse_manifest
from interventions.storage import publish, temporary_path, write_synced
from steering.affine import AffineParameters
from steering.reward import RewardHead
from steering.stored import parameters_of

_STORED_TYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_HASHED_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A checked artifact. Its tensors are float32 on the CPU, whatever type the file has."""

    digest: str  # sha256 of the file's bytes, hexadecimal
    size: int  # of the file, in bytes
    manifest: Manifest
    parameters: AffineParameters | RewardHead


@dataclass(frozen=True, slots=True)
class Summary:
    """The content of an artifact's header, which is read without reading the tensors."""

    size: int  # of the file, in bytes
    manifest: Manifest
    shapes: Shapes


def read_artifact(path: Path, limits: ArtifactLimits = DEFAULT_LIMITS) -> Artifact:
    """Read an artifact, and check everything that the format demands.

    Raises:
        UnreadableArtifactError: the file cannot be read.
        ArtifactError: the file is not an artifact; the message is a sentence that says why.
    """
    summary = read_summary(path, limits)
    try:
        tensors = _read_tensors(path)
        digest = artifact_digest(path)
    except OSError as error:
        raise UnreadableArtifactError(f"{path.name} cannot be read: {error.strerror}.") from error
    except SafetensorError as error:
        raise ArtifactError(f"The file is not a safetensors file: {error}") from error
    except RuntimeError as error:  # torch opens the file once more, and raises this if it cannot
        raise UnreadableArtifactError(f"{path.name} cannot be read.") from error
    _check_values(summary.shapes, tensors)
    return Artifact(
        digest=digest,
        size=summary.size,
        manifest=summary.manifest,
        parameters=parameters_of(tensors),
    )


def read_summary(path: Path, limits: ArtifactLimits = DEFAULT_LIMITS) -> Summary:
    """Read and check the header alone: the manifest, and the tensors' names, types and shapes.

    Raises:
        ArtifactError: the file has no header of an artifact.
    """
    header = read_header(path, limits)
    manifest = _manifest(header, limits)
    return Summary(header.size, manifest, check_layout(manifest, header.shapes, limits))


def read_manifest(path: Path, limits: ArtifactLimits = DEFAULT_LIMITS) -> Manifest:
    """Read the manifest alone, without any check of the tensors.

    Raises:
        ArtifactError: the file is not a safetensors file or holds no valid manifest.
    """
    return _manifest(read_header(path, limits), limits)


def artifact_digest(path: Path) -> str:
    """Return the sha256 of the file's bytes, hexadecimal; raise OSError if it cannot be read."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            sha256.update(chunk)
    return sha256.hexdigest()


def write_artifact(
    path: Path,
    manifest: Manifest,
    parameters: AffineParameters | RewardHead,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Write an artifact and return its digest. The same input gives the same bytes.

    The new file is read back with every check before it replaces an older one at `path`, so that
    `read_artifact` takes every file that this function has written. The folder must exist.

    Raises:
        ArtifactError: the parameters do not fit the manifest's kind, are not finite in `dtype`, or
            have shapes or names that the format forbids; or the format has no `dtype`.
        OSError: the file cannot be written.
    """
    if dtype not in _STORED_TYPES:
        raise ArtifactError(f"Artifacts are float32, float16 or bfloat16, not {dtype}.")
    # Tensors of several sites may share memory, which safetensors refuses; hence the copies.
    tensors = {
        name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in to_tensors(parameters).items()
    }
    # One entry only, because safetensors writes several in no fixed order.
    data = safetensors.torch.save(tensors, metadata={"manifest": manifest_text(manifest)})
    temporary = temporary_path(path.parent)
    try:
        write_synced(temporary, data)
        digest = read_artifact(temporary).digest
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _manifest(header: Header, limits: ArtifactLimits) -> Manifest:
    text = header.metadata.get("manifest")
    if text is None:
        raise ArtifactError('The file has no "manifest" in its metadata: it is not an artifact.')
    if len(text.encode()) > limits.max_manifest_bytes:
        raise ArtifactError(
            f"The manifest has {len(text.encode())} bytes; the limit is "
            f"{limits.max_manifest_bytes}."
        )
    try:
        return parse_manifest(text)
    except ManifestError as error:
        raise ArtifactError(str(error)) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        # Copied, because the library's tensors are views of the file, which may change.
        return {
            name: file.get_tensor(name).to(torch.float32, copy=True) for name in sorted(file.keys())
        }


def _check_values(shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f'The tensor "{name}" holds a value that is not finite.')
    if not isinstance(shapes, AffineShapes):
        return
    for site in shapes.site_widths:
        low, high = tensors.get(f"sites.{site}.low"), tensors.get(f"sites.{site}.high")
        if low is not None and high is not None and (low > high).any():
            raise ArtifactError(f'The site "{site}" has a low above its high.')
