"""Reads the metadata and the unquantized tensors of a small GGUF file, version 2 or 3.

The package `gguf` has a reader too, but it follows lengths that a damaged or malicious file states,
beyond the file's end: a list of 2^60 numbers keeps it busy for ever. This reader takes only as much
as the file has, and needs no package.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from interventions.importers.imported import ImportFileError
from interventions.importers.local_files import read_bytes

MAGIC: Final = b"GGUF"

_MAX_BYTES: Final = 256 << 20  # of a file: the vectors of 100 layers of width 32768 have 13 MB
_MAX_ENTRIES: Final = 10_000  # metadata keys, or tensors
_MAX_DIMENSIONS: Final = 4
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_LIST: Final = 9
# Type of a value -> its `struct` format.
_SCALARS: Final[Mapping[int, str]] = {
    **dict(enumerate("BbHhIif?")),
    **dict(zip((10, 11, 12), "Qqd", strict=True)),
}
# Type of a tensor -> its dtype; all others are quantized or no floating-point numbers.
_DTYPES: Final[Mapping[int, torch.dtype]] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """The content of a GGUF file; lists in the metadata are left out."""

    metadata: Mapping[str, int | float | bool | str]
    tensors: Mapping[str, Tensor]  # as stored: float32, float16 or bfloat16


def read_gguf(path: Path, architecture: str) -> GgufFile:
    """Read a GGUF file whose metadata name an architecture.

    Raises:
        ImportFileError: the file cannot be read, is too large, is no GGUF file, is of another
            architecture, is damaged, or has tensors that are quantized.
    """
    data = read_bytes(path, _MAX_BYTES)
    if not data.startswith(MAGIC):
        raise ImportFileError(f"{path} is not a GGUF file.")
    try:
        return _read(_Cursor(data), architecture)
    except _GgufError as error:
        raise ImportFileError(f"{path}: {error}.") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise ImportFileError(
            f"{path} is damaged: its header is not that of a GGUF file."
        ) from error


class _GgufError(ValueError):
    """The file is refused; the message is a clause that says why."""


class _Cursor:
    """Takes values from the file's bytes, one after another, and none beyond their end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = len(MAGIC)

    def take(self, kind: str) -> int | float | bool:
        layout = struct.Struct(f"<{kind}")
        value: int | float | bool
        (value,) = layout.unpack_from(self.data, self.offset)
        self.offset += layout.size
        return value

    def number(self, kind: str) -> int:
        return int(self.take(kind))

    def skip(self, count: int) -> int:
        """Move on by some bytes; return the offset before."""
        before = self.offset
        if count > len(self.data) - before:
            raise _GgufError("it is cut short, or a length in its header is wrong")
        self.offset += count
        return before

    def text(self) -> str:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length].decode()


def _read(cursor: _Cursor, architecture: str) -> GgufFile:
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise _GgufError(f"its GGUF version is {version}; 2 and 3 are read")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    if max(tensors, entries) > _MAX_ENTRIES:
        raise _GgufError(f"it states {max(tensors, entries)} entries; the limit is {_MAX_ENTRIES}")
    metadata: dict[str, int | float | bool | str] = {}
    for _ in range(entries):
        key = cursor.text()
        value = _value(cursor, cursor.number("I"))
        if value is not None:
            metadata[key] = value
    found_architecture = metadata.get("general.architecture")
    if found_architecture != architecture:
        raise _GgufError(
            f"its architecture is {str(found_architecture)[:100]!r}, and not {architecture!r}"
        )
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _GgufError("its alignment is not a positive number")
    begin = -(-cursor.offset // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise _GgufError(f"it has two tensors {name[:100]!r}")
        found[name] = _tensor(cursor.data, name, shape, kind, begin + offset)
    return GgufFile(metadata, found)


def _value(cursor: _Cursor, kind: int) -> int | float | bool | str | None:
    """Return a value of the metadata; skip a list, and return None."""
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.take(_SCALARS[kind])
    if kind != _LIST:
        raise _GgufError(f"a value in its header has the unknown type {kind}")
    item, length = cursor.number("I"), cursor.number("Q")
    if item in _SCALARS:
        cursor.skip(length * struct.calcsize(f"<{_SCALARS[item]}"))
    elif item == _STRING:
        for _ in range(length):  # each takes 8 bytes at least, so the file's end stops it
            cursor.text()
    else:
        raise _GgufError(f"a list in its header has items of type {item}")
    return None


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return a tensor's name, shape, type, and offset from the first tensor's begin."""
    name = cursor.text()
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise _GgufError(f"its tensor {name[:100]!r} has {dimensions} dimensions")
    # The first dimension is the innermost.
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(data: bytes, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
    shown = repr(name[:100])
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise _GgufError(
            f"its tensor {shown} is quantized or of integers; F32, F16 and BF16 are read"
        )
    count = prod(shape)
    if count == 0 or begin + count * dtype.itemsize > len(data):
        raise _GgufError(f"its tensor {shown} is empty, or the file is cut short")
    return torch.frombuffer(
        bytearray(data[begin : begin + count * dtype.itemsize]), dtype=dtype
    ).reshape(shape)
