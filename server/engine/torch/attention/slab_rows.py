"""Rows for slabs in one layer, side by side: what no token was stored in is zeros."""

from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from server.engine.torch.attention.mapped import PAGE_BYTES, Mapping, whole_pages


class LayerRows(Protocol):
    """A layer's keys, then its values: (2, rows, kv_heads, capacity, head_dim)."""

    tensor: Tensor
    granule: int  # memory is given back in multiples of so many tokens

    def clear(self, row: int, start: int) -> None:
        """Make zeros of a row's tokens from one on, and give their memory back."""
        ...


def make_rows(
    rows: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> LayerRows:
    """Rows of zeros.

    Raises:
        OSError, torch.OutOfMemoryError: there is no memory.
    """
    size = (2, rows, kv_heads, capacity, head_dim)
    return MappedRows(size, dtype) if device.type == "cpu" else PlainRows(size, dtype, device)


class PlainRows:
    """Rows whose memory is taken from the start, as on a GPU."""

    granule = 1

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)

    def clear(self, row: int, start: int) -> None:
        """As all rows'; see `LayerRows.clear`. The memory stays taken."""
        self.tensor[:, row, :, start:] = 0


class MappedRows:
    """Rows whose memory is taken as tokens are stored, in pages for each head."""

    def __init__(self, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
        parts, rows, heads, capacity, head_dim = size
        self._token = head_dim * dtype.itemsize
        self._head = whole_pages(capacity * self._token)  # each head begins a page
        self._row = heads * self._head
        self._part = rows * self._row
        self.granule = PAGE_BYTES // gcd(PAGE_BYTES, self._token)
        self._mapping = Mapping(parts * self._part)
        strides = (self._part, self._row, self._head, self._token, dtype.itemsize)
        flat = self._mapping.bytes.view(dtype)
        self.tensor = flat.as_strided(size, [each // dtype.itemsize for each in strides])

    def clear(self, row: int, start: int) -> None:
        """As all rows'; see `LayerRows.clear`."""
        for part in range(self.tensor.shape[0]):
            first = part * self._part + row * self._row
            if start == 0:
                self._mapping.clear(first, first + self._row)
                continue
            for head in range(0, self._row, self._head):
                at = first + head
                self._mapping.clear(at + start * self._token, at + self._head)
