"""Maps memory that is taken when it is written to, and given back when it is cleared.

torch's own allocator may keep freed memory instead. An anonymous mapping reads as zeros, and each
of its pages takes physical memory from the first write until it is cleared.
"""

import mmap
import sys
import weakref
from math import prod
from typing import Final

import torch
from torch import Tensor

PAGE_BYTES: Final = mmap.PAGESIZE
_GIVES_BACK: Final = sys.platform == "linux"  # elsewhere, clearing writes zeros and frees nothing
_SLOTS_A_CHUNK: Final = 64


def whole_pages(size: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class Mapping:
    """An anonymous mapping, as a tensor of bytes that begin as zeros."""

    def __init__(self, size: int) -> None:
        """Map `size` bytes. Raises OSError if there is no room for them."""
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _GIVES_BACK:  # the first write to a huge page would take all of it
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def clear(self, start: int, end: int) -> None:
        """Set bytes `start` to `end` to zero, and give the whole pages among them back."""
        first, last = whole_pages(start), end // PAGE_BYTES * PAGE_BYTES
        if not _GIVES_BACK or first >= last:
            self.bytes[start:end] = 0
            return
        if start < first:
            self.bytes[start:first] = 0
        if last < end:
            self.bytes[last:end] = 0
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def view(self, start: int, size: int) -> memoryview:
        """Return `size` bytes from `start` on, as a buffer that keeps the mapping alive."""
        return memoryview(self._map)[start : start + size]


class TensorPool:
    """Allocates tensors of one shape, and frees a tensor's memory when nothing refers to it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self._size = prod(shape) * dtype.itemsize
        self._stride = whole_pages(self._size)
        self._free: dict[Mapping, list[int]] = {}  # by chunk, the byte offsets of its free slots

    def take(self) -> Tensor:
        """Return a contiguous tensor of the shape, filled with zeros.

        Raises:
            OSError: there is no memory.
        """
        chunk = next((each for each, slots in self._free.items() if slots), None)
        if chunk is None:
            chunk = Mapping(_SLOTS_A_CHUNK * self._stride)
            self._free[chunk] = [slot * self._stride for slot in range(_SLOTS_A_CHUNK)]
        slot = self._free[chunk].pop()
        view = chunk.view(slot, self._size)
        # The tensor's storage keeps `view` alive, so this runs when its last user is gone.
        weakref.finalize(view, self._give_back, chunk, slot).atexit = False
        return torch.frombuffer(view, dtype=self._dtype).view(self._shape)

    def _give_back(self, chunk: Mapping, slot: int) -> None:
        chunk.clear(slot, slot + self._stride)
        self._free[chunk].append(slot)
        if len(self._free[chunk]) == _SLOTS_A_CHUNK:
            del self._free[chunk]
