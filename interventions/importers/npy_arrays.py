"""Reads one row of an array in a NumPy `.npz` archive, without expanding the whole array."""

import ast
import zipfile
from pathlib import Path
from typing import IO, Final

import torch
from torch import Tensor

from interventions.importers.imported import ImportFileError
from interventions.importers.local_files import check_file

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER_BYTES: Final = 65_536
_MAX_MEMBERS: Final = 1000
# Floating-point numbers compress little; what expands more is no file of weights.
_MAX_EXPANSION: Final = 20
_SKIPPED_AT_ONCE: Final = 1 << 20
_DTYPES: Final = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an archive.

    Raises:
        ImportFileError: the file cannot be read or is no archive.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error
    except Exception as error:  # for damaged directories not only BadZipFile
        raise ImportFileError(f"{path} is no .npz archive, or is damaged.") from error
    if len(names) > _MAX_MEMBERS:
        raise ImportFileError(f"{path} has {len(names)} members; the limit is {_MAX_MEMBERS}.")
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def read_row(path: Path, name: str, row: int) -> Tensor:
    """Return one row of a matrix in an archive, as it is stored.

    Raises:
        ImportFileError: the archive is damaged, or the array is no matrix of floating-point
            numbers in C order, or has no such row.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.file_size > _MAX_EXPANSION * member.compress_size:
                raise ImportFileError(f'{path}: the array "{name}" would expand too much.')
            with archive.open(member) as file:
                return _row(path, name, row, file)
    except ImportFileError:
        raise
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror or error}.") from error
    except Exception as error:  # zipfile raises errors of many types for damaged archives
        raise ImportFileError(f'{path} is damaged: the array "{name}" cannot be read.') from error


def _row(path: Path, name: str, row: int, file: IO[bytes]) -> Tensor:
    dtype, (rows, width) = _header(path, name, file)
    if not 0 <= row < rows:
        raise ImportFileError(f'{path}: "{name}" has rows 0 to {rows - 1}, and no row {row}.')
    size = width * dtype.itemsize
    if size > _SKIPPED_AT_ONCE:
        raise ImportFileError(f'{path}: the rows of "{name}" have width {width}.')
    left = row * size
    while left:
        skipped = len(file.read(min(left, _SKIPPED_AT_ONCE)))
        if not skipped:
            break
        left -= skipped
    data = bytearray(file.read(size))
    if left or len(data) < size:
        raise ImportFileError(f'{path}: the array "{name}" is cut short.')
    return torch.frombuffer(data, dtype=dtype)


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[torch.dtype, tuple[int, int]]:
    start = file.read(len(_MAGIC) + 2)
    length_bytes = 2 if start[-2:-1] == b"\x01" else 4
    length = int.from_bytes(file.read(length_bytes), "little")
    if not start.startswith(_MAGIC) or not 0 < length <= _MAX_HEADER_BYTES:
        raise ImportFileError(f'{path}: "{name}" is no NumPy array.')
    fields = ast.literal_eval(file.read(length).decode("latin-1").strip())
    dtype, shape = _DTYPES.get(fields["descr"]), fields["shape"]
    if dtype is None or fields["fortran_order"] is not False:
        raise ImportFileError(
            f'{path}: "{name}" is not an array of float16, float32 or float64 in C order.'
        )
    sizes = [size for size in shape if type(size) is int and size > 0]
    if len(sizes) != 2 or len(shape) != 2:
        raise ImportFileError(f'{path}: "{name}" has shape {str(shape)[:100]}; expected a matrix.')
    return dtype, (sizes[0], sizes[1])
