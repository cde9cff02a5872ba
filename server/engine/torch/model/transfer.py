"""Tensors between host and device: to it in copies that nobody waits for, from it in one wait."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

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
    """Tensors of the CPU, on a device; one copy brings them all."""
    layout = Layout.of(tensors)
    host = layout.host_buffer(device)
    for view, tensor in zip(layout.views(host), tensors, strict=True):
        view.copy_(tensor)
    return layout.views(host.to(device, non_blocking=True))


def send(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, on a device: (n,) of a dtype, which is torch's choice where it is None."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tree: T) -> T:
    """The same nest of named tuples, with copies of its tensors on the host; waits for the devices.

    What is neither a tensor nor a named tuple stays as it is.
    """
    devices: set[torch.device] = set()
    fetched: T = _fetched(tree, devices)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return fetched


def _fetched(tree: Any, devices: set[torch.device]) -> Any:
    """The nest with copies on the host, which have arrived once the devices were waited for."""
    if isinstance(tree, Tensor):
        if tree.is_cuda:
            devices.add(tree.device)
        return start_copy(tree)
    if isinstance(tree, tuple):
        return type(tree)(*(_fetched(each, devices) for each in tree))
    return tree


def start_copy(tensor: Tensor) -> Tensor:
    """On the host, where it has arrived once anybody has waited for its device."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
