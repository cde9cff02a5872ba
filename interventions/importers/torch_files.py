"""Reads files that `torch.save` has written, without running any code from them."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Final

import torch
from torch import Tensor

from interventions.importers.imported import ImportFileError
from interventions.importers.local_files import check_file

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_RECORDS: Final = 10_000  # of an archive: one for each tensor
_MAX_PICKLE_BYTES: Final = 4 << 20  # of the names and shapes


def read_torch_file(path: Path) -> object:
    """Return the tensors and plain values in a file of `torch.save`, memory-mapped.

    Raises:
        ImportFileError: the file cannot be read, is not such a file, is damaged, or holds objects
            that only code could rebuild.
    """
    size = check_file(path)
    _check_archive(path, size)
    try:
        value: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror or error}.") from error
    except UnpicklingError as error:
        raise ImportFileError(
            f"{path} holds other objects than tensors, numbers and strings. They could only be "
            "rebuilt by running code, so the file is refused."
        ) from error
    except Exception as error:  # torch's reader raises errors of many types for damaged files
        raise ImportFileError(f"{path} is damaged: torch cannot read it.") from error
    return value


def _check_archive(path: Path, size: int) -> None:
    """Check that the file is an archive whose records are no larger than the file itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error
    except Exception as error:  # for damaged directories not only BadZipFile
        raise ImportFileError(
            f"{path} was not written by torch.save of torch 1.6 or later: it is no zip archive. "
            "Other pickles are never read."
        ) from error
    # torch stores its records as they are. A compressed one could expand to any size.
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > size:
        raise ImportFileError(f"{path} has compressed records, which torch.save does not write.")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ImportFileError(f"{path} was not written by torch.save: it has no data.pkl.")
    if len(records) > _MAX_RECORDS or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise ImportFileError(f"{path} holds too many objects.")


def read_torch_mapping(path: Path) -> Mapping[str, object]:
    """Return the state dictionary in a file.

    Raises:
        ImportFileError: see `read_torch_file`; or the file holds something else.
    """
    value = read_torch_file(path)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ImportFileError(f"{path} does not hold a state dictionary.")
    return value


def checked_tensor(path: Path, name: str, value: object, *, is_float: bool = True) -> Tensor:
    """Return a tensor as it is stored, of which each element has bytes of its own in the file.

    Args:
        path: the file, for messages.
        name: the tensor's name, for messages.
        value: what the file has under that name.
        is_float: False if integers and booleans are accepted too.

    Raises:
        ImportFileError: the value is not a dense tensor on the CPU, or not of numbers with a
            floating point.
    """
    if not isinstance(value, Tensor):
        raise ImportFileError(f'{path}: "{name}" is not a tensor.')
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ImportFileError(f'{path}: "{name}" is not a dense tensor of numbers.')
    # A view with stride 0 would have any size without bytes in the file.
    if not value.is_contiguous():
        raise ImportFileError(f'{path}: "{name}" is not contiguous.')
    plain = value.dtype in (torch.bool, torch.uint8, torch.int32, torch.int64)
    if value.dtype not in _FLOATS and (is_float or not plain):
        raise ImportFileError(f'{path}: "{name}" has type {value.dtype}, which is not accepted.')
    return value.detach()


def float_tensor(path: Path, name: str, value: object, shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor in float32.

    Args:
        path: the file, for messages.
        name: the tensor's name, for messages.
        value: what the file has under that name.
        shape: the expected shape; None stands for any positive number.

    Raises:
        ImportFileError: the value is not a tensor of floating-point numbers of this shape, or not
            finite in float32.
    """
    tensor = checked_tensor(path, name, value)
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        size == wanted or (wanted is None and size > 0)
        for size, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ImportFileError(f'{path}: "{name}" has shape {found}; expected ({expected}).')
    converted = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(converted).all():
        raise ImportFileError(f'{path}: "{name}" holds a value that is not finite.')
    return converted


def row_vector(path: Path, name: str, value: object, width: int | None = None) -> Tensor:
    """Return a tensor of shape (d,) or (1, d) as (d,) float32.

    Raises:
        ImportFileError: see `float_tensor`.
    """
    tensor = checked_tensor(path, name, value)
    if math.prod(tensor.shape[:-1]) == 1:
        tensor = tensor.reshape(-1)
    return float_tensor(path, name, tensor, (width,))
