"""The torch operator `steerserve::routed_edit`: a step's affine edits at one site, in place.

A model that is compiled once, or captured as a CUDA graph, calls it in every step with the same
tensors. Their contents say how much of them the step uses, so that a step without edits costs
almost nothing.
"""

import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steering.affine import (
    ALL_MAPPED,
    HAS_MAP,
    MapTable,
    edit_mapped_tokens,
    edit_stacks,
    edit_tokens,
)
from steering.kernels.operators import define_operator, use_on_gpus
from steering.site_maps import reduced

NAME: Final = "routed_edit"
_SCHEMA: Final = (
    f"{NAME}(Tensor(a!) activations, Tensor extent, Tensor rows, Tensor slots, Tensor strength, "
    "Tensor(b!) doses, Tensor(c!) seconds, Tensor used_flags, Tensor flags, Tensor delta, "
    "Tensor bias, Tensor? low, Tensor? high, Tensor? gate_weight, Tensor? gate_bias) -> ()"
)


class StepTensors(NamedTuple):
    """A step's route, at addresses that never change. Each column belongs to one row (token)."""

    # (5,) int64: the number of edits in the deepest stack, the number of columns in use, 1 if every
    # column has an edit at each depth, 1 if doses are measured, and on a CPU the number of columns
    # whose rows are edited: those after them are only measured.
    extent: Tensor
    rows: Tensor  # (columns,) int64, the columns' rows; on a GPU, column i belongs to row i
    slots: Tensor  # (depth, columns) int64; 0, the identity, where there is no edit
    strength: Tensor  # (depth, columns) float32
    doses: Tensor  # (2, depth, columns) float32, the sums of the doses and their numbers
    seconds: Tensor  # (2,) float64, the time of edits and that of measuring them; 0 on a GPU


RoutedEdit: TypeAlias = Callable[[Tensor, StepTensors, Tensor, MapTable], None]
"""A function that edits activations in place, as `edit_in_place` does."""


def routed_edit(
    activations: Tensor, step: StepTensors, used_flags: Tensor, table: MapTable
) -> None:
    """Edit a site's activations in place, by a step's route; see `edit_in_place`."""
    torch.ops.steerserve.routed_edit(activations, *step, used_flags, *table)


def edit_in_place(
    activations: Tensor, step: StepTensors, used_flags: Tensor, table: MapTable
) -> None:
    """Edit the rows that have a column, each by the maps of its stack. Other rows keep their bits.

    Columns that are only measured leave their rows as they are: a compiled model edits them.

    In a measured step, doses are added to `step.doses`, and times to `step.seconds`.

    Args:
        activations: (rows, d), any floating dtype, on a CPU.
        step: the step's route.
        used_flags: (1,) int32, what `SiteMaps.flags_of` says of the step's slots at this site.
        table: the site's maps.
    """
    depth, columns, is_full, is_measured, edited = step.extent.tolist()
    if not depth:
        return
    began = time.perf_counter()
    [used] = used_flags.tolist()
    if not used & HAS_MAP:
        return
    rows = None if edited == len(activations) else step.rows[:columns]
    before = (activations if rows is None else activations.index_select(0, rows)).float()
    edit = edit_mapped_tokens if is_full and used & ALL_MAPPED else edit_tokens
    table, z = reduced(table, used), before[:edited]
    for index in range(depth if edited else 0):
        z = edit(z, step.slots[index, :edited], step.strength[index, :edited], table)
    measuring = 0.0
    if is_measured:
        # By a second edit, so that the time of the first is that of a step without measuring.
        began_measuring = time.perf_counter()
        stacks = step.slots[:depth, :columns], step.strength[:depth, :columns]
        edit_stacks(before, *stacks, table, step.doses[:, :depth, :columns])
        measuring = time.perf_counter() - began_measuring
    if rows is None:
        activations.copy_(z)
    elif edited:
        activations.index_copy_(0, rows[:edited], z.to(activations.dtype))
    if is_measured:
        editing = time.perf_counter() - began - measuring if edited else 0.0
        step.seconds.add_(torch.tensor([editing, measuring], dtype=torch.float64))


def use_routed_kernel_on_gpus(kernel: RoutedEdit) -> None:
    """Register a kernel as the operator's implementation on NVIDIA GPUs, for this process."""
    use_on_gpus(NAME, _flattened(kernel))


def _flattened(edit: RoutedEdit) -> Callable[..., None]:
    """Return `edit` as a function that takes all tensors one by one, as operators must."""
    last = 1 + len(StepTensors._fields)

    def flattened(*tensors: Tensor) -> None:
        edit(
            tensors[0],
            StepTensors(*tensors[1:last]),
            tensors[last],
            MapTable(*tensors[last + 1 :]),
        )

    return flattened


def _nothing(*_tensors: Tensor | None) -> None:
    """Return nothing, as the operator does."""


define_operator(_SCHEMA, _flattened(edit_in_place), _nothing, backends=("CPU",))
