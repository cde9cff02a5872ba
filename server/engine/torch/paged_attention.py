"""One step's attention over pages: all sequences in one call a layer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from server.engine.torch.attention_step import AttentionStep, How, KVMemory, Lane, Piece
from server.engine.torch.page_pool import PAGE, PagedLane, PagePool
from server.engine.torch.slab import SlabShape
from server.engine.torch.varlen import PagedIndex, VarlenForm


class PagedStep(AttentionStep):
    """One step over pages."""

    def __init__(self, pool: PagePool, form: VarlenForm, index: PagedIndex) -> None:
        super().__init__()
        self._pool = pool
        self._form = form
        self.index = index

    def moved(self, index: PagedIndex) -> "PagedStep":
        """The same step, with its tensors on the pages' device."""
        step = PagedStep(self._pool, self._form, index)
        step.windows = self.windows
        return step

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """As every step's; see `AttentionStep.attend`."""
        self.windows.add(how.window)
        keys, values = self._pool.layer(layer)
        for stored, new in ((keys, key), (values, value)):
            stored.flatten(0, 1).index_copy_(0, self.index.slots, new[0].transpose(0, 1))
        packed = query[0].transpose(0, 1)  # (tokens, heads, head_dim)
        return self._form.attend(packed, keys, values, self.index, how)[None]


class PagedMemory(KVMemory):
    """Pages, and how to attend over them. Steps are built on the CPU and moved at once."""

    fixed = True
    batch_device = torch.device("cpu")
    probe_lanes = 6

    def __init__(self, shape: SlabShape, pages: int, form: VarlenForm) -> None:
        """`pages` counts the scratch page."""
        self.pool = PagePool(shape, pages)
        self.form = form

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.pool.device

    def lane(self) -> PagedLane:
        """A lane without pages yet."""
        return PagedLane(self.pool)

    def order(self, piece: Piece) -> tuple[bool, int, int]:
        """Those that decode first, as there are graphs for steps of nothing else."""
        return piece.count > 1, 0, 0

    def step(self, pieces: Sequence[Piece]) -> PagedStep:
        """The attention of a step; its tensors are on the CPU."""
        return PagedStep(self.pool, self.form, self._index(pieces))

    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that these lanes, and no others, have pages, each its own."""
        self.pool.check(_paged(lane) for lane in lanes)

    def _index(self, pieces: Sequence[Piece]) -> PagedIndex:
        rows = torch.tensor([_paged(piece.lane).row for piece in pieces])
        starts = torch.tensor([piece.start for piece in pieces])
        counts = torch.tensor([piece.count for piece in pieces])
        lengths = starts + counts
        most_keys = int(lengths.max())
        tables = self.pool.tables[:, : -(-most_keys // PAGE)].index_select(0, rows)
        key_ends = _ends(lengths)
        return PagedIndex(
            slots=_slots(tables, starts, counts),
            query_ends=_ends(counts),
            key_ends=key_ends,
            lengths=lengths.int(),
            tables=tables,
            keys=_slots(tables, torch.zeros_like(starts), lengths) if self.form.gathers else None,
            most_queries=int(counts.max()),
            most_keys=most_keys,
        )


def _paged(lane: Lane) -> PagedLane:
    assert isinstance(lane, PagedLane), "a lane of another memory"
    return lane


def _ends(counts: Tensor) -> Tensor:
    """(n,) int64 -> (n + 1,) int32: 0, then the sums of the first counts."""
    ends = torch.zeros(len(counts) + 1, dtype=torch.int32)
    ends[1:] = counts.cumsum(0)
    return ends


def _slots(tables: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Where consecutive tokens of each of n lanes are.

    Args:
        tables: (n, pages) int32; `starts`, `counts`: (n,) int64, each one's first token and how
            many they are.

    Returns:
        (tokens,) int64, page * 256 + place in the page.
    """
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    firsts = counts.cumsum(0) - counts
    places = torch.arange(len(owners)) - (firsts - starts)[owners]
    return tables[owners, places // PAGE].long() * PAGE + places % PAGE
