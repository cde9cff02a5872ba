"""The inputs of a captured decode step: tensors whose contents change, but not their addresses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.torch.attention.page_pool import PAGE, SCRATCH
from server.engine.torch.attention.paged_index import PagedIndex, Tiling
from server.engine.torch.model.transfer import Layout
from server.engine.torch.step.batch import Batch
from server.engine.torch.step.graph_keys import GraphKey
from steering.route import AffineRoute, Route


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The inputs, on the host or on the device; padding rows come last. See `PagedIndex`."""

    input_ids: Tensor  # (1, rows) int64
    position_ids: Tensor  # (1, rows) int64
    slots: Tensor  # (rows,) int64, where keys and values go
    query_ends: Tensor  # (rows + 1,) int32
    lengths: Tensor  # (rows,) int32
    tables: Tensor  # (rows, pages) int32
    block_spans: Tensor  # (rows,) int32
    block_starts: Tensor  # (rows,) int32, zeros
    edit_slots: Tensor  # (depth, rows) int64, the bank's slots
    strength: Tensor  # (depth, rows) float32


class DecodeInputs:
    """Holds all inputs of one graph, and fills them by one copy from the host."""

    def __init__(self, key: GraphKey, pages: int, device: torch.device) -> None:
        """`pages` is the number of pages of the longest sequence."""
        self._key = key
        self._pages = pages
        self._device = device
        self._layout = Layout.of(_empty(key, pages))
        self._buffer = torch.zeros(self._layout.size, dtype=torch.uint8, device=device)
        self._tensors = _Tensors(*self._layout.views(self._buffer))
        self.input_ids = self._tensors.input_ids  # (1, rows) int64
        self.position_ids = self._tensors.position_ids  # (1, rows) int64
        self._send(lambda _tensors: None)

    def index(self, tiling: Tiling) -> PagedIndex:
        """Make an index for the attention, whose tensors are the inputs."""
        tensors = self._tensors
        return PagedIndex(
            slots=tensors.slots,
            query_ends=tensors.query_ends,
            lengths=tensors.lengths,
            tables=tensors.tables,
            block_spans=tensors.block_spans,
            block_starts=tensors.block_starts,
            block_rows=tiling.block_rows(1),
            splits=tiling.splits(self._key.rows),
            max_keys=self._pages * PAGE,
        )

    def route(self) -> Route:
        """Make a route for the hooks, whose tensors are the inputs."""
        tensors = self._tensors
        indices = tuple(range(self._key.depth))
        affine = AffineRoute(indices, tensors.edit_slots, tensors.strength, used_slots=None)
        return Route(affine if indices else None, (), self._device)

    def fill(self, batch: Batch, index: PagedIndex) -> None:
        """Copy in a decoding batch that fits the graph; `index` is its attention's."""
        count = batch.input_ids.numel()

        def put(tensors: _Tensors) -> None:
            tensors.input_ids[:, :count] = batch.input_ids
            tensors.position_ids[:, :count] = batch.position_ids
            tensors.slots[:count] = index.slots
            tensors.lengths[:count] = index.lengths
            tensors.tables[:count, : index.tables.shape[1]] = index.tables
            if (affine := batch.route.affine) is not None:
                for edit, slots, strength in zip(
                    affine.indices, affine.slots, affine.strength, strict=True
                ):
                    tensors.edit_slots[edit, :count] = slots
                    tensors.strength[edit, :count] = strength

        self._send(put)

    def fill_example(self, vocabulary: int, slot: int) -> None:
        """Copy in an example: tokens stored in the scratch page, all edited by a slot's map."""
        places = torch.arange(self._key.rows) % PAGE  # rows that share a place are equal

        def put(tensors: _Tensors) -> None:
            tensors.input_ids[0] = (7 * places + 3) % vocabulary
            tensors.position_ids[0] = places
            tensors.slots.copy_(SCRATCH * PAGE + places)
            tensors.lengths.copy_(places + 1)
            tensors.edit_slots.fill_(slot)
            tensors.strength.fill_(0.5)

        self._send(put)

    def _send(self, put: Callable[[_Tensors], None]) -> None:
        """Let `put` fill a buffer on the host, and copy it; rows that it leaves are padding."""
        host = self._layout.host_buffer(self._device).zero_()  # slot 0 edits nothing
        tensors = _Tensors(*self._layout.views(host))
        torch.arange(self._key.rows + 1, out=tensors.query_ends)
        torch.arange(self._key.rows, out=tensors.block_spans)
        # A padding row sees one key, its own, which it writes to the scratch page.
        tensors.slots.fill_(SCRATCH * PAGE)
        tensors.lengths.fill_(1)
        tensors.tables.fill_(SCRATCH)
        put(tensors)
        self._buffer.copy_(host, non_blocking=True)


def _empty(key: GraphKey, pages: int) -> Sequence[Tensor]:
    """Make tensors like the fields of `_Tensors`, without memory."""

    def like(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    rows = key.rows
    return (
        like(1, rows, dtype=torch.int64),
        like(1, rows, dtype=torch.int64),
        like(rows, dtype=torch.int64),
        like(rows + 1, dtype=torch.int32),
        like(rows, dtype=torch.int32),
        like(rows, pages, dtype=torch.int32),
        like(rows, dtype=torch.int32),
        like(rows, dtype=torch.int32),
        like(key.depth, rows, dtype=torch.int64),
        like(key.depth, rows, dtype=torch.float32),
    )
