"""Lists the tensors of a step's index that a device needs, and replaces them.

The caller copies all listed tensors to the device at once, and puts the copies in their place.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from server.engine.torch.attention.paged_index import PagedIndex
from server.engine.torch.model.transfer import to_device


def index_tensors(index: PagedIndex) -> list[Tensor]:
    """List the tensors of an index."""
    return [
        *(index.slots, index.query_ends, index.lengths),
        *(index.tables, index.block_spans, index.block_starts),
    ]


def with_index_tensors(index: PagedIndex, tensors: Sequence[Tensor]) -> PagedIndex:
    """Return an index with other tensors, which are in the order of `index_tensors`."""
    slots, query_ends, lengths, tables, block_spans, block_starts = tensors
    return replace(
        index,
        slots=slots,
        query_ends=query_ends,
        lengths=lengths,
        tables=tables,
        block_spans=block_spans,
        block_starts=block_starts,
    )


def index_to_device(index: PagedIndex, device: torch.device) -> PagedIndex:
    """Copy an index to a device."""
    return with_index_tensors(index, to_device(index_tensors(index), device))
