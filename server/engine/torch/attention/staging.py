"""Lists the tensors of a step's index and route that a device needs, and replaces them.

The caller copies all listed tensors to the device at once, and puts the copies in their place.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from server.engine.torch.attention.paged_index import PagedIndex
from server.engine.torch.model.transfer import to_device
from steering.route import Route


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


def route_tensors(route: Route) -> list[Tensor]:
    """List the tensors of a route."""
    affine = route.affine
    tensors = [] if affine is None else [affine.slots, affine.strength]
    for reward in route.reward:
        tensors += [reward.rows, reward.slots, reward.tile_sizes]
        tensors += [reward.direction_scale, reward.step_sizes]
    return tensors


def with_route_tensors(route: Route, tensors: Sequence[Tensor], device: torch.device) -> Route:
    """Return a route with other tensors, which are in the order of `route_tensors`."""
    rest = iter(tensors)
    affine = route.affine
    if affine is not None:
        affine = replace(affine, slots=next(rest), strength=next(rest))
    reward = tuple(
        replace(
            layer,
            rows=next(rest),
            slots=next(rest),
            tile_sizes=next(rest),
            direction_scale=next(rest),
            step_sizes=next(rest),
        )
        for layer in route.reward
    )
    return Route(affine, reward, device)
