"""Computes a step's attention over pages: one call a layer, for all sequences."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from server.engine.torch.attention.backend import (
    AttentionParams,
    AttentionStep,
    KVMemory,
    Lane,
    LaneSpan,
)
from server.engine.torch.attention.page_pool import PagedLane, PagePool
from server.engine.torch.attention.paged_index import (
    PagedAttention,
    PagedIndex,
    Tiling,
    build_index,
)
from server.engine.torch.attention.slab import KVShape


class PagedStep(AttentionStep):
    """Attends for one step over pages."""

    def __init__(self, pool: PagePool, attend: PagedAttention, index: PagedIndex) -> None:
        super().__init__()
        self._pool = pool
        self._attend = attend
        self.index = index

    def moved(self, index: PagedIndex) -> "PagedStep":
        """Return the same step with another index, whose tensors are on the pages' device."""
        step = PagedStep(self._pool, self._attend, index)
        step.windows = self.windows
        return step

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the step's keys and values, then attend; see `AttentionStep.attend`."""
        self.windows.add(params.window)
        keys, values = self._pool.layer(layer)
        for stored, new in ((keys, key), (values, value)):
            stored.flatten(0, 1).index_copy_(0, self.index.slots, new[0].transpose(0, 1))
        packed = query[0].transpose(0, 1)  # (tokens, heads, head_dim)
        return self._attend(packed, keys, values, self.index, params)[None]


class PagedMemory(KVMemory):
    """Pages, and the function that attends over them.

    Steps are built on the CPU, and moved to the pages' device by one copy.
    """

    is_preallocated = True
    batch_device = torch.device("cpu")
    probe_lanes = 6

    def __init__(self, shape: KVShape, pages: int, tiling: Tiling, attend: PagedAttention) -> None:
        """`pages` counts the scratch page."""
        self.pool = PagePool(shape, pages)
        self.device = self.pool.device
        self.tiling = tiling
        self.attend = attend

    def lane(self) -> PagedLane:
        """Make a lane that has no pages yet."""
        return PagedLane(self.pool)

    def step(self, spans: Sequence[LaneSpan]) -> PagedStep:
        """Make the attention of a step; its tensors are on the CPU."""
        rows = torch.tensor([_paged(span.lane).row for span in spans])
        index = build_index(
            self.pool.tables.index_select(0, rows),
            [span.start for span in spans],
            [span.count for span in spans],
            self.tiling,
        )
        return PagedStep(self.pool, self.attend, index)

    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that exactly these lanes have pages, and that none share any."""
        self.pool.check(_paged(lane) for lane in lanes)


def _paged(lane: Lane) -> PagedLane:
    assert isinstance(lane, PagedLane), "a lane of another memory"
    return lane
