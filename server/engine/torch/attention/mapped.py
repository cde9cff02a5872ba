"""Memory that is taken as it is written, and given back: what torch's own allocator keeps.

An anonymous mapping reads as zeros. A page of it takes memory from the first write on, until it is
cleared.
"""

import mmap
import sys
import weakref
from math import prod
from typing import Final

import torch
from torch import Tensor

PAGE_BYTES: Final = mmap.PAGESIZE
_GIVES_BACK: Final = sys.platform == "linux"  # elsewhere, what is cleared is zeros and stays taken
_SLOTS_A_CHUNK: Final = 64


def whole_pages(size: int) -> int:
    """The bytes of the pages that so many bytes take."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class Mapping:
    """Zeros, as a tensor of bytes."""

    def __init__(self, size: int) -> None:
        """Raises OSError if there is no room for so many bytes."""
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _GIVES_BACK:  # a huge page would be taken as a whole by its first byte
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def clear(self, start: int, end: int) -> None:
        """Make some bytes zeros again; the whole pages among them are given back."""
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
        """Some of its bytes, as a buffer that keeps it."""
        return memoryview(self._map)[start : start + size]


class KeptCopies:
    """Memory for copies of one size, each of which is given back when its tensor is gone."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self._size = prod(shape) * dtype.itemsize
        self._stride = whole_pages(self._size)
        self._free: dict[Mapping, list[int]] = {}  # the offsets of each chunk's free slots
        self.taken = 0  # copies that there are

    @property
    def bytes(self) -> int:
        """Memory that is taken."""
        return self.taken * self._stride

    def take(self) -> Tensor:
        """Zeros of the shape, contiguous.

        Raises:
            OSError: there is no memory.
        """
        chunk = next((each for each, slots in self._free.items() if slots), None)
        if chunk is None:
            chunk = Mapping(_SLOTS_A_CHUNK * self._stride)
            self._free[chunk] = [slot * self._stride for slot in range(_SLOTS_A_CHUNK)]
        slot = self._free[chunk].pop()
        view = chunk.view(slot, self._size)
        # The tensor keeps the view, whatever is made of it.
        weakref.finalize(view, self._give_back, chunk, slot).atexit = False
        self.taken += 1
        return torch.frombuffer(view, dtype=self._dtype).view(self._shape)

    def _give_back(self, chunk: Mapping, slot: int) -> None:
        self.taken -= 1
        chunk.clear(slot, slot + self._stride)
        self._free[chunk].append(slot)
        if len(self._free[chunk]) == _SLOTS_A_CHUNK:
            del self._free[chunk]
