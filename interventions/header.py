"""Reads and checks the header of a safetensors file, before any library opens the file.

Eight bytes of length (little endian), that many bytes of JSON, then the tensors' bytes.
"""

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from interventions.strict_json import JsonLimits, StrictJSONError, parse_json

_PREFIX_BYTES: Final = 8
_ELEMENT_BYTES: Final[tuple[tuple[str, int], ...]] = (("F32", 4), ("F16", 2), ("BF16", 2))
# weight, bias, low, high, and the gate's weight and bias
_TENSORS_OF_SITE: Final = 6
_LONGEST_NAME: Final = 500  # characters of a tensor's name, more than any module path has
_SHOWN: Final = 300
_ENTRY_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


class ArtifactError(ValueError):
    """The file is not accepted as an artifact; the message is a sentence that says why."""


class UnreadableArtifactError(ArtifactError):
    """The file cannot be read, so its content is unknown."""


@dataclass(frozen=True, slots=True)
class ArtifactLimits:
    """The limits of an accepted artifact."""

    max_bytes: int = 1 << 30
    max_header_bytes: int = 4 << 20
    max_manifest_bytes: int = 64 << 10
    max_sites: int = 1024
    max_head_units: int = 8192

    @property
    def json(self) -> JsonLimits:
        """The limits of the header as JSON, which the largest artifact stays within."""
        tensors = (
            self.max_sites * _TENSORS_OF_SITE + 100
        )  # so that one site too many gets its own message
        return JsonLimits(
            containers=3 * tensors,  # an entry with its shape and its offsets
            strings=5 * tensors,  # a name, three keys and a type
            commas=5 * tensors,
            members=tensors,
        )


DEFAULT_LIMITS: Final = ArtifactLimits()


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. The tensors' bytes fill the rest of the file exactly."""

    size: int  # of the whole file, in bytes
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]  # tensor name -> shape, in the order of the names


def read_header(path: Path, limits: ArtifactLimits = DEFAULT_LIMITS) -> Header:
    """Read and check the header of a file; the tensors' bytes are not read.

    Raises:
        UnreadableArtifactError: the file cannot be read.
        ArtifactError: it is larger than the limit, is no safetensors file, or holds a tensor of
            another type than float32, float16 and bfloat16.
    """
    try:
        # Checked before opening, because opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError(f"{path.name} is not a regular file.")
        with path.open("rb") as file:
            return _read(file, limits)
    except OSError as error:
        raise UnreadableArtifactError(f"{path.name} cannot be read: {error.strerror}.") from error


def _read(file: BinaryIO, limits: ArtifactLimits) -> Header:
    size = file.seek(0, 2)
    file.seek(0)
    if size > limits.max_bytes:
        raise ArtifactError(f"The file has {size} bytes; the limit is {limits.max_bytes}.")
    prefix = file.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX_BYTES or length > size - _PREFIX_BYTES:
        raise ArtifactError(_not_safetensors(prefix, "it is cut short or its header length lies"))
    if length > limits.max_header_bytes:
        raise ArtifactError(
            f"The file's header has {length} bytes; the limit is {limits.max_header_bytes}."
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ArtifactError(_not_safetensors(prefix, "its header is not a JSON object"))
    fields = _parse(text, limits.json)
    metadata = _metadata(fields.pop("__metadata__", {}))
    shapes = _tensors(fields, size - _PREFIX_BYTES - length)
    return Header(size, metadata, shapes)


def _not_safetensors(prefix: bytes, reason: str) -> str:
    # Only for a refused file: a good one with 640 bytes of header starts like a pickle.
    if prefix.startswith(b"PK\x03\x04") or prefix[:1] == b"\x80":
        return (
            "The file is a pickle or a zip archive of pickles; pickles are never read. If another "
            'project wrote it, "steerserve import" may make an artifact of it.'
        )
    if prefix.startswith(b"GGUF"):
        return (
            'The file is a GGUF file. If it holds a control vector, "steerserve import '
            'control-vector" makes an artifact of it.'
        )
    return f"The file is not a safetensors file: {reason}."


def _parse(text: bytes, limits: JsonLimits) -> dict[str, object]:
    try:
        fields = parse_json(text.decode(), limits)
    except UnicodeDecodeError as error:
        raise ArtifactError("The file's header is not valid UTF-8.") from error
    except StrictJSONError as error:
        raise ArtifactError(f"The file's header {error}.") from error
    if not isinstance(fields, dict):
        raise ArtifactError("The file's header is not a JSON object.")
    return fields


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ArtifactError('The header\'s "__metadata__" is not an object.')
    for key, text in value.items():
        if not isinstance(text, str):
            raise ArtifactError(f'The header\'s "__metadata__" {key[:100]!r} is not a string.')
    return value


def _tensors(fields: Mapping[str, object], data_bytes: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in sorted(fields.items()):
        shape, begin, end = _tensor(name, entry)
        shapes[name] = shape
        spans.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            raise ArtifactError(
                f"The bytes of tensor {name[:_SHOWN]!r} overlap others or leave a gap."
            )
        covered = end
    if covered != data_bytes:
        raise ArtifactError(
            f"The tensors need {covered} bytes, the file has {data_bytes}: it is cut short or "
            "something was appended."
        )
    return shapes


def _tensor(name: str, entry: object) -> tuple[tuple[int, ...], int, int]:
    shown = repr(name[:_SHOWN])
    if len(name) > _LONGEST_NAME:  # error messages quote names
        raise ArtifactError(
            f"The name of tensor {shown}… has {len(name)} characters; the limit is {_LONGEST_NAME}."
        )
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS:
        raise ArtifactError(f"The header's entry of tensor {shown} is malformed.")
    dtype = entry["dtype"]
    element_bytes = next((count for known, count in _ELEMENT_BYTES if known == dtype), None)
    if element_bytes is None:
        raise ArtifactError(
            f"Tensor {shown} has type {str(dtype)[:20]!r}; only F32, F16 and BF16 are accepted."
        )
    shape, offsets = _integers(entry["shape"]), _integers(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 2:
        raise ArtifactError(f"The header's entry of tensor {shown} is malformed.")
    begin, end = offsets
    if end - begin != prod(shape) * element_bytes:
        raise ArtifactError(f"The shape of tensor {shown} contradicts the number of its bytes.")
    return shape, begin, end


def _integers(value: object) -> tuple[int, ...] | None:
    """Return a list of integers from 0 on as a tuple, None for any other value."""
    if not isinstance(value, list):
        return None
    integers = [item for item in value if type(item) is int and item >= 0]
    return tuple(integers) if len(integers) == len(value) else None
