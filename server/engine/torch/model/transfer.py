"""Copies tensors between host and device: to the device without a wait, and back with one wait."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNMENT: Final = 16  # bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Places tensors of certain shapes and dtypes in a buffer of bytes."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    size: int  # bytes

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """Return a layout with room for tensors like these."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        shapes = tuple(tensor.shape for tensor in tensors)
        return cls(shapes, tuple(tensor.dtype for tensor in tensors), tuple(starts), size)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return views of the tensors in a buffer, which is (size,) uint8."""
        return [
            buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, start in zip(self.shapes, self.dtypes, self.starts, strict=True)
        ]

    def host_buffer(self, device: torch.device) -> Tensor:
        """Return a buffer on the host, (size,) uint8; it is pinned if the device is a GPU.

        torch keeps its memory until the copies from it are done.
        """
        return torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the CPU on a device. They are all brought there in one copy."""
    layout = Layout.of(tensors)
    host = layout.host_buffer(device)
    for view, tensor in zip(layout.views(host), tensors, strict=True):
        view.copy_(tensor)
    return layout.views(host.to(device, non_blocking=True))


def device_tensor(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return numbers as a tensor on a device: (n,) of `dtype`, or of torch's choice for None."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tree: T) -> T:
    """Return a tree of named tuples with its tensors copied to the host. Waits for the devices.

    Values that are neither tensors nor named tuples stay as they are.
    """
    devices: set[torch.device] = set()
    copied: T = _start_copies(tree, devices)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _start_copies(tree: Any, devices: set[torch.device]) -> Any:
    """Start the copies to the host, and add the devices that must be waited for to `devices`."""
    if isinstance(tree, Tensor):
        if tree.is_cuda:
            devices.add(tree.device)
        return start_copy_to_host(tree)
    if isinstance(tree, tuple):
        return type(tree)(*(_start_copies(each, devices) for each in tree))
    return tree


def start_copy_to_host(tensor: Tensor) -> Tensor:
    """Start to copy a tensor to the host. The copy is complete once its device was waited for."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
