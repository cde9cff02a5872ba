"""Brings a step's tensors to the device in one copy that the host does not wait for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.varlen import PagedIndex
from steering.route import Route

_ALIGNMENT: Final = 16  # bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors of certain shapes and dtypes lie in a buffer of bytes."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    size: int  # bytes

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """Room for tensors like these."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        shapes = tuple(tensor.shape for tensor in tensors)
        return cls(shapes, tuple(tensor.dtype for tensor in tensors), tuple(starts), size)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer: (size,) uint8."""
        return [
            buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, start in zip(self.shapes, self.dtypes, self.starts, strict=True)
        ]

    def host_buffer(self, device: torch.device) -> Tensor:
        """A buffer on the host from which a device copies by itself: (size,) uint8.

        torch keeps its memory until the copies from it are done.
        """
        return torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def stage(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU, on a device."""
    layout = Layout.of(tensors)
    host = layout.host_buffer(device)
    for view, tensor in zip(layout.views(host), tensors, strict=True):
        view.copy_(tensor)
    return layout.views(host.to(device, non_blocking=True))


def index_tensors(index: PagedIndex) -> list[Tensor]:
    """What of an index has to be moved."""
    tensors = [index.slots, index.query_ends, index.key_ends, index.lengths, index.tables]
    return tensors if index.keys is None else [*tensors, index.keys]


def with_index_tensors(index: PagedIndex, tensors: Sequence[Tensor]) -> PagedIndex:
    """An index with other tensors, in the order of `index_tensors`."""
    slots, query_ends, key_ends, lengths, tables, *keys = tensors
    return replace(
        index,
        slots=slots,
        query_ends=query_ends,
        key_ends=key_ends,
        lengths=lengths,
        tables=tables,
        keys=keys[0] if keys else None,
    )


def stage_index(index: PagedIndex, device: torch.device) -> PagedIndex:
    """An index on a device."""
    return with_index_tensors(index, stage(index_tensors(index), device))


def route_tensors(route: Route) -> list[Tensor]:
    """What of a route has to be moved."""
    tensors = []
    for layer in route.affine:
        tensors += [layer.slots, layer.strength]
    for group in route.reward:
        tensors += [group.rows, group.eta, group.iterations, group.direction_scale]
    return tensors


def with_route_tensors(route: Route, tensors: Sequence[Tensor], device: torch.device) -> Route:
    """A route with other tensors, in the order of `route_tensors`."""
    rest = iter(tensors)
    affine = tuple(replace(layer, slots=next(rest), strength=next(rest)) for layer in route.affine)
    reward = tuple(
        replace(
            group,
            rows=next(rest),
            eta=next(rest),
            iterations=next(rest),
            direction_scale=next(rest),
        )
        for group in route.reward
    )
    return Route(affine, reward, device)
