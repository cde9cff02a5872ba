"""Keeps keys and values on a GPU in pages of 64 tokens, allocated when the engine starts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.attention.backend import Lane
from server.engine.torch.attention.slab import KVShape

PAGE: Final = 64  # tokens in a page, and the most keys in a tile of the kernel
SCRATCH: Final = 0  # the page that no sequence owns: padding rows of a batch write to it

_FIRST_ROWS: Final = 16


class OutOfPagesError(RuntimeError):
    """No page is free; the scheduler should never plan a step that raises this."""


class PagePool:
    """Holds all pages of an engine, whose layers must be on one device."""

    def __init__(self, shape: KVShape, pages: int) -> None:
        """`pages` counts the scratch page.

        Raises:
            ValueError: the layers are on several devices.
        """
        devices = set(shape.devices)
        if len(devices) != 1:
            raise ValueError("pages are for a model on one device")
        [self.device] = devices
        self.pages = pages
        size = (len(shape.devices), 2, pages, PAGE, shape.kv_heads, shape.head_dim)
        # Each layer's keys, then its values. Uninitialized, as only written tokens are read.
        self._store = torch.empty(size, dtype=shape.dtype, device=self.device)
        self._free = [page for page in reversed(range(pages)) if page != SCRATCH]
        # Each lane has a row, which lists its pages in order. On the CPU, where steps are built.
        self.tables = torch.full((_FIRST_ROWS, 1), SCRATCH, dtype=torch.int32)
        self._free_rows = list(reversed(range(_FIRST_ROWS)))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of one layer's keys and values: (pages, 64, kv_heads, head_dim) each."""
        keys, values = self._store[index]
        return keys, values

    def page(self, number: int) -> Tensor:
        """Return a view of one page in all layers: (layers, 2, 64, kv_heads, head_dim)."""
        return self._store[:, :, number]

    def take(self) -> int:
        """Take a free page, which still holds the tokens of its last owner.

        Raises:
            OutOfPagesError: there is none.
        """
        if not self._free:
            raise OutOfPagesError(f"all {self.pages} pages of keys and values are taken")
        return self._free.pop()

    def give_back(self, pages: Iterable[int]) -> None:
        """Make pages free again."""
        self._free.extend(pages)

    def take_row(self) -> int:
        """Take a free row of the tables."""
        if not self._free_rows:
            rows = len(self.tables)
            self._free_rows = list(reversed(range(rows, 2 * rows)))
            self.tables = torch.cat((self.tables, torch.full_like(self.tables, SCRATCH)))
        return self._free_rows.pop()

    def give_back_row(self, row: int) -> None:
        """Make a row of the tables free again."""
        self._free_rows.append(row)

    def set_page(self, row: int, place: int, page: int) -> None:
        """Write a page's number into a row of the tables, at index `place`."""
        width = self.tables.shape[1]
        if place >= width:
            more = torch.full((len(self.tables), width), SCRATCH, dtype=torch.int32)
            self.tables = torch.cat((self.tables, more), dim=1)
        self.tables[row, place] = page

    def check(self, lanes: Iterable["PagedLane"]) -> None:
        """Assert that each page is free, scratch, or held by one lane and listed in its row."""
        lanes = [lane for lane in lanes if lane.capacity]
        held = list(chain.from_iterable(lane.pages for lane in lanes))
        everyone = sorted([SCRATCH, *self._free, *held])
        assert everyone == list(range(self.pages)), "pages are lost or held twice"
        assert len({lane.row for lane in lanes}) == len(lanes), "two lanes share a row"
        assert len(lanes) + len(self._free_rows) == len(self.tables), "rows are lost"
        for lane in lanes:
            listed = self.tables[lane.row, : len(lane.pages)].tolist()
            assert listed == lane.pages, "a row that is not its lane's"


class PagedLane(Lane):
    """Holds one sequence's keys and values, in pages."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.row = -1  # the lane's row in the pool's tables; valid while it has pages

    @property
    def capacity(self) -> int:
        """The number of tokens that the lane has room for."""
        return len(self.pages) * PAGE

    def reserve(self, tokens: int) -> None:
        """Make room for at least `tokens` tokens; stored tokens are kept.

        Raises:
            OutOfPagesError: there are too few pages; the lane keeps those that it has by now.
        """
        while self.capacity < tokens:
            page = self._pool.take()
            if not self.pages:
                self.row = self._pool.take_row()
            self._pool.set_page(self.row, len(self.pages), page)
            self.pages.append(page)

    def truncate(self, tokens: int) -> None:
        """Give back the pages that hold none of the first `tokens` tokens."""
        kept = -(-tokens // PAGE)
        if kept < len(self.pages):
            self._pool.give_back(self.pages[kept:])
            del self.pages[kept:]
            if not self.pages:
                self._pool.give_back_row(self.row)

    def free(self) -> None:
        """Give all pages back."""
        self.truncate(0)

    def read(self, start: int, end: int) -> list[Tensor]:
        """Copy tokens `start` to `end`: one tensor (layers, 2, tokens, kv_heads, head_dim)."""
        parts = [
            self._pool.page(self.pages[place])[:, :, first:last]
            for place, first, last in _parts(start, end)
        ]
        return [torch.cat(parts, dim=2)]

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store the tensor that `read` returned, as the tokens from `start` on."""
        [stored] = values
        end = start + stored.shape[2]
        self.reserve(end)
        done = 0
        for place, first, last in _parts(start, end):
            count = last - first
            page = self._pool.page(self.pages[place])
            page[:, :, first:last] = stored[:, :, done : done + count]
            done += count


def _parts(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the pages that hold tokens `start` to `end` of a lane.

    Each is given as its index among the lane's pages, and the range of tokens within the page.
    """
    for place in range(start // PAGE, -(-end // PAGE)):
        yield place, max(start - place * PAGE, 0), min(end - place * PAGE, PAGE)
