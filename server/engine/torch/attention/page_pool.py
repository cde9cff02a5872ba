"""Memory for keys and values on a GPU: pages of 64 tokens, allocated when the engine starts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.attention.backend import Lane
from server.engine.torch.attention.slab import SlabShape

PAGE: Final = 64  # tokens, of which the kernel multiplies no more at once
SCRATCH: Final = 0  # a page that no sequence has: rows that pad a batch write there

_FIRST_ROWS: Final = 16


class OutOfPagesError(RuntimeError):
    """No page is free; whoever planned the step has promised that one is."""


class PagePool:
    """All pages of an engine whose layers are on one device."""

    def __init__(self, shape: SlabShape, pages: int) -> None:
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
        # Each layer's keys, then its values. What was not written is never read.
        self._store = torch.empty(size, dtype=shape.dtype, device=self.device)
        self._free = [page for page in reversed(range(pages)) if page != SCRATCH]
        # Each lane's pages, in a row of its own. On the CPU, where steps are built.
        self.tables = torch.full((_FIRST_ROWS, 1), SCRATCH, dtype=torch.int32)
        self._free_rows = list(reversed(range(_FIRST_ROWS)))

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values: views of (pages, 64, kv_heads, head_dim)."""
        keys, values = self._store[index]
        return keys, values

    def page(self, number: int) -> Tensor:
        """One page of all layers: a view of (layers, 2, 64, kv_heads, head_dim)."""
        return self._store[:, :, number]

    def take(self) -> int:
        """A free page, with whatever its last owner left in it.

        Raises:
            OutOfPagesError: there is none.
        """
        if not self._free:
            raise OutOfPagesError(f"all {self.pages} pages of keys and values are taken")
        return self._free.pop()

    def give_back(self, pages: Iterable[int]) -> None:
        """Pages that nobody has any longer."""
        self._free.extend(pages)

    def take_row(self) -> int:
        """A free row of the tables."""
        if not self._free_rows:
            rows = len(self.tables)
            self._free_rows = list(reversed(range(rows, 2 * rows)))
            self.tables = torch.cat((self.tables, torch.full_like(self.tables, SCRATCH)))
        return self._free_rows.pop()

    def give_back_row(self, row: int) -> None:
        """A row that nobody uses any longer."""
        self._free_rows.append(row)

    def set_page(self, row: int, place: int, page: int) -> None:
        """Write a lane's page into its row."""
        width = self.tables.shape[1]
        if place >= width:
            more = torch.full((len(self.tables), width), SCRATCH, dtype=torch.int32)
            self.tables = torch.cat((self.tables, more), dim=1)
        self.tables[row, place] = page

    def check(self, lanes: Iterable["PagedLane"]) -> None:
        """Assert that each page is free, scratch, or one lane's, as that lane's row says."""
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
    """One sequence's keys and values, in pages."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []
        self.row = -1  # in the pool's tables, while there are pages

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return len(self.pages) * PAGE

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens; what is stored stays.

        Raises:
            OutOfPagesError: there are not enough pages; it keeps those that it has.
        """
        while self.capacity < tokens:
            page = self._pool.take()
            if not self.pages:
                self.row = self._pool.take_row()
            self._pool.set_page(self.row, len(self.pages), page)
            self.pages.append(page)

    def truncate(self, tokens: int) -> None:
        """Give the pages back that store nothing before a token."""
        kept = -(-tokens // PAGE)
        if kept < len(self.pages):
            self._pool.give_back(self.pages[kept:])
            del self.pages[kept:]
            if not self.pages:
                self._pool.give_back_row(self.row)

    def free(self) -> None:
        """Give the pages back."""
        self.truncate(0)

    def read(self, start: int, end: int) -> list[Tensor]:
        """A copy of what is stored of some tokens: one (layers, 2, tokens, kv_heads, head_dim)."""
        parts = [
            self._pool.page(self.pages[place])[:, :, first:last]
            for place, first, last in _parts(start, end)
        ]
        return [torch.cat(parts, dim=2)]

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store what `read` gave, from a token on."""
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
    """The pages that some tokens are in: which of a lane's, and from where to where there."""
    for place in range(start // PAGE, -(-end // PAGE)):
        yield place, max(start - place * PAGE, 0), min(end - place * PAGE, PAGE)
