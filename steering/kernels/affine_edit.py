"""The torch operator `steerserve::affine_edit`: all affine edits of a step at one site.

Hooks call it, also while a CUDA graph is captured. Layers compiled for a CPU call `edit_stacks`
instead, so that the compiler fuses its arithmetic with the layer's.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor

from steering.affine import MapTable, edit_stacks
from steering.kernels.operators import define_operator, use_on_gpus

NAME: Final = "affine_edit"
_SCHEMA: Final = (
    f"{NAME}(Tensor activations, Tensor slots, Tensor strength, Tensor flags, Tensor delta, "
    "Tensor bias, Tensor? low, Tensor? high, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor(a!)? doses) -> Tensor"
)


EditStacks: TypeAlias = Callable[[Tensor, Tensor, Tensor, MapTable, Tensor | None], Tensor]
"""A function that edits n tokens at one site, as `edit_stacks` does."""


def affine_edit(
    activations: Tensor,
    slots: Tensor,
    strength: Tensor,
    table: MapTable,
    doses: Tensor | None = None,
) -> Tensor:
    """Edit n tokens at one site, each by the maps of its stack; see `edit_stacks`."""
    edited: Tensor = torch.ops.steerserve.affine_edit(activations, slots, strength, *table, doses)
    return edited


def use_kernel_on_gpus(kernel: EditStacks) -> None:
    """Register a kernel as the operator's implementation on NVIDIA GPUs, for this process."""
    use_on_gpus(NAME, _flattened(kernel))


def _flattened(edit: EditStacks) -> Callable[..., Tensor]:
    """Return `edit` as a function that takes the table's tensors one by one, as operators must."""

    def flattened(
        activations: Tensor,
        slots: Tensor,
        strength: Tensor,
        flags: Tensor,
        delta: Tensor,
        bias: Tensor,
        *others: Tensor | None,
    ) -> Tensor:
        *optional, doses = others
        table = MapTable(flags, delta, bias, *optional)
        return edit(activations, slots, strength, table, doses)

    return flattened


def _shape(activations: Tensor, *_others: Tensor | None) -> Tensor:
    """Return an empty tensor of the result's shape."""
    return torch.empty_like(activations, memory_format=torch.contiguous_format)


define_operator(_SCHEMA, _flattened(edit_stacks), _shape, backends=("CompositeExplicitAutograd",))
