"""Allocates the rows that one layer's slabs lie in; rows are zeros where no token is stored."""

from math import gcd
from typing import TypeAlias

import torch

from server.engine.torch.attention.mapped import PAGE_BYTES, Mapping, whole_pages

RowsSize: TypeAlias = tuple[int, int, int, int, int]
"""A layer's keys, then its values: (2, rows, kv_heads, capacity, head_dim)."""


class PlainRows:
    """Rows on a GPU, which take all of their memory from the start."""

    granule = 1

    def __init__(self, size: RowsSize, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)

    def clear(self, row: int, start: int) -> None:
        """Zero a row's tokens from `start` on; their memory stays taken."""
        self.tensor[:, row, :, start:] = 0


class MappedRows:
    """Rows on a CPU, which take memory as tokens are stored, by pages of each head."""

    def __init__(self, size: RowsSize, dtype: torch.dtype) -> None:
        parts, rows, heads, capacity, head_dim = size
        self._token = head_dim * dtype.itemsize
        self._head = whole_pages(capacity * self._token)  # so that each head begins a page
        self._row = heads * self._head
        self._part = rows * self._row
        # The least number of a head's tokens that fill whole pages.
        self.granule = PAGE_BYTES // gcd(PAGE_BYTES, self._token)
        self._mapping = Mapping(parts * self._part)
        strides = (self._part, self._row, self._head, self._token, dtype.itemsize)
        flat = self._mapping.bytes.view(dtype)
        self.tensor = flat.as_strided(size, [each // dtype.itemsize for each in strides])

    def clear(self, row: int, start: int) -> None:
        """Zero a row's tokens from `start` on, and give their memory back."""
        for part in range(self.tensor.shape[0]):
            first = part * self._part + row * self._row
            if start == 0:
                self._mapping.clear(first, first + self._row)
                continue
            for head in range(0, self._row, self._head):
                at = first + head
                self._mapping.clear(at + start * self._token, at + self._head)
