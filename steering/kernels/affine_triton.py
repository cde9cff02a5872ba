"""A Triton kernel for all affine edits at a site, in one launch for any mix of interventions.

A program keeps one token's row in registers and applies its maps in turn. So a gate sees the whole
row, and activations are read and written once. The launch is the same whichever slots the tokens
use, so that a CUDA graph can hold it.

Import it only where there is a GPU: `triton` is not installed everywhere.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering.affine import HAS_GATE, HAS_SUPPORT, MapTable
from steering.dose import MAX_DOSE
from steering.kernels.routed_edit import StepTensors

_HAS_SUPPORT: Final = tl.constexpr(HAS_SUPPORT)
_HAS_GATE: Final = tl.constexpr(HAS_GATE)
_MAX_DOSE: Final = tl.constexpr(MAX_DOSE)

_ALIGNMENT: Final = 16  # of addresses (bytes) and strides (numbers), for vectorised loads
_NUMBERS_OF_A_THREAD: Final = 16  # of a row; with the map's they take about 90 registers
_MIN_WARPS: Final = 4  # of a program
_MAX_WARPS: Final = 32
_WARP: Final = 32  # threads
_WIDE: Final = 8192  # width beyond which a program needs 1024 threads, with only 64 registers each


@triton.jit
def _edit_row(
    z,  # (block,) float32
    scale,  # the strength
    slot,
    has,  # the slot's bits in `flags`
    delta,
    bias,
    low,
    high,
    gate_weight,
    gate_bias,
    column,
    real,  # (block,) bool, column < width
    width: tl.constexpr,
    is_wide: tl.constexpr,
):
    at = slot * width + column
    # Loads come before the branches, to overlap, unless registers are too few to keep their values.
    if not is_wide:
        own_delta = tl.load(delta + at, mask=real, other=0.0)
        own_bias = tl.load(bias + at, mask=real, other=0.0)
    if (has & _HAS_GATE) != 0:
        own_gate = tl.load(gate_weight + at, mask=real, other=0.0)
        own_gate_bias = tl.load(gate_bias + slot)
        scale *= tl.sigmoid(tl.sum(z * own_gate, 0) + own_gate_bias)
    inside = real
    if (has & _HAS_SUPPORT) != 0:
        lowest = tl.load(low + at, mask=real, other=0.0)
        highest = tl.load(high + at, mask=real, other=0.0)
        inside = real & (z >= lowest) & (z <= highest)
    if is_wide:
        own_delta = tl.load(delta + at, mask=real, other=0.0)
        own_bias = tl.load(bias + at, mask=real, other=0.0)
    return tl.where(inside, tl.fma(tl.fma(own_delta, z, own_bias), scale, z), z)


@triton.jit
def _dose(before, after):
    change = after - before
    dose = tl.div_rn(tl.sqrt_rn(tl.sum(change * change, 0)), tl.sqrt_rn(tl.sum(before * before, 0)))
    return tl.where(dose < _MAX_DOSE, dose, _MAX_DOSE)  # also for NaN


# Arguments that differ between steps, or between the buffers of CUDA graphs, are not specialised:
# every specialisation would compile another kernel.
@triton.jit(
    do_not_specialize=[
        *("slots", "strength", "flags", "gate_bias", "doses", "extent", "depth"),
        *("row_stride", "slots_stride", "strength_stride", "doses_stride", "half_stride"),
    ]
)
def _edit_kernel(
    edited,  # (n, width), any floating dtype
    activations,  # (n, width) of the same dtype
    slots,  # (depth, n) int64
    strength,  # (depth, n) float32
    flags,  # (slots,) int32
    delta,  # (slots, width) float32
    bias,  # (slots, width) float32
    low,  # (slots, width) float32; not read if no slot has a support
    high,  # (slots, width) float32; likewise
    gate_weight,  # (slots, width) float32; not read if no slot has a gate
    gate_bias,  # (slots,) float32; likewise
    doses,  # (2, depth, n) float32; not read without `has_doses`
    extent,  # (5,) int64, see `StepTensors`; not read unless `is_routed`
    depth,  # not read if `is_routed`
    row_stride,
    slots_stride,
    strength_stride,
    doses_stride,
    half_stride,
    width: tl.constexpr,
    block: tl.constexpr,
    is_aligned: tl.constexpr,
    is_wide: tl.constexpr,
    has_doses: tl.constexpr,
    is_routed: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    is_measured = has_doses
    if is_routed:
        depth = tl.where(token < tl.load(extent + 1), tl.load(extent), 0)
        is_measured = tl.load(extent + 3) != 0
    column = tl.arange(0, block)
    real = column < width
    start = token * row_stride
    if is_aligned:
        start = tl.multiple_of(start, 16)
    row = tl.load(activations + start + column, mask=real, other=0.0)
    any_flags = 0
    for place in range(depth):
        any_flags |= tl.load(flags + tl.load(slots + place * slots_stride + token))
    if any_flags == 0:
        if not is_routed:  # it would be stored where it was loaded from
            # Copied without a cast to float32, which would change some NaN bit patterns.
            tl.store(edited + token * width + column, row, mask=real)
    else:
        z = row.to(tl.float32)
        for place in range(depth):
            slot = tl.load(slots + place * slots_stride + token)
            has = tl.load(flags + slot)
            if has != 0:
                scale = tl.load(strength + place * strength_stride + token)
                after = _edit_row(
                    *(z, scale, slot, has, delta, bias, low, high, gate_weight, gate_bias),
                    *(column, real, width, is_wide),
                )
                if has_doses and is_measured:
                    at_dose = doses + place * doses_stride + token
                    tl.store(at_dose, tl.load(at_dose) + _dose(z, after))
                    tl.store(at_dose + half_stride, tl.load(at_dose + half_stride) + 1.0)
                z = after
        tl.store(edited + token * width + column, z.to(edited.dtype.element_ty), mask=real)


def edit_stacks_triton(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    """Edit n tokens, each by the maps of its stack; see `edit_stacks`.

    A token's bits depend only on its own row, slots and strengths, and on their maps.
    """
    # Triton launches on the current device.
    with torch.cuda.device_of(activations):  # type: ignore[no-untyped-call]
        return _edit(activations, slots, strength, table, doses)


def edit_in_place_triton(
    activations: Tensor, step: StepTensors, _used_flags: Tensor, table: MapTable
) -> None:
    """Edit activations in place by a step's route, in which column i belongs to row i.

    Does what `edit_in_place` of `kernels/routed_edit.py` does; times are not measured.
    """
    rows = activations
    if not rows.is_contiguous() or _is_unaligned(rows):
        rows = rows.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(activations):  # type: ignore[no-untyped-call]
        _launch(rows, rows, step.slots, step.strength, table, step.doses, step.extent)
    if rows is not activations:
        activations.copy_(rows)


def _edit(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    tokens, width = activations.shape
    depth = len(slots)
    edited = torch.empty((tokens, width), dtype=activations.dtype, device=activations.device)
    assert slots.shape == strength.shape == (depth, tokens), "each token has its own stack"
    assert doses is None or doses.shape == (2, depth, tokens), "each edit has its own dose"
    activations = _readable(activations)
    slots, strength = _side_by_side(slots), _side_by_side(strength)
    _launch(edited, activations, slots, strength, table, doses, None)
    return edited


def _launch(
    edited: Tensor,
    activations: Tensor,
    slots: Tensor,
    strength: Tensor,
    table: MapTable,
    doses: Tensor | None,
    extent: Tensor | None,
) -> None:
    """Launch the kernel, a program for each token."""
    tokens, width = activations.shape
    if activations.numel() == 0:
        return
    assert table.delta.shape[1] == width, "the maps are of this site"
    for each in table:
        assert each is None or each.is_contiguous(), "a slot's numbers lie side by side"
    half_stride = doses_stride = 0
    if doses is not None:
        half_stride, doses_stride, token_stride = doses.stride()
        assert token_stride == 1, "doses of one place lie side by side"
    _edit_kernel[(tokens,)](
        edited,
        activations,
        slots,
        strength,
        table.flags,
        table.delta,
        table.bias,
        # Where there is no tensor, any other will do: the kernel does not read it.
        table.delta if table.low is None else table.low,
        table.delta if table.high is None else table.high,
        table.delta if table.gate_weight is None else table.gate_weight,
        table.delta if table.gate_bias is None else table.gate_bias,
        strength if doses is None else doses,
        slots if extent is None else extent,
        len(slots),
        activations.stride(0),
        slots.stride(0),
        strength.stride(0),
        doses_stride,
        half_stride,
        **_constants(width, doses is not None, extent is not None),
        **_options(width),
    )


def _constants(width: int, has_doses: bool, is_routed: bool) -> dict[str, int]:
    """Return the kernel's compile-time constants."""
    block: int = triton.next_power_of_2(width)
    return {
        "width": width,
        "block": block,
        "is_aligned": width % _ALIGNMENT == 0,
        "is_wide": block > _WIDE,
        "has_doses": has_doses,
        "is_routed": is_routed,
    }


def _options(width: int) -> dict[str, int]:
    """Return the kernel's compile options."""
    warps = triton.next_power_of_2(width) // (_WARP * _NUMBERS_OF_A_THREAD)
    return {
        "num_warps": min(_MAX_WARPS, max(_MIN_WARPS, warps)),
        "num_stages": 1,
        # Fusion of multiply-adds could depend on whether doses are computed too, but edits must
        # have the same bits with and without doses.
        "enable_fp_fusion": False,
    }


def _readable(activations: Tensor) -> Tensor:
    """Return the rows, copied if their alignment is not what the kernel for their width expects."""
    activations = _side_by_side(activations)
    if _is_unaligned(activations):
        # A kernel compiled for unaligned rows might sum a gate's terms in another order.
        return activations.clone(memory_format=torch.contiguous_format)
    return activations


def _is_unaligned(rows: Tensor) -> bool:
    """Return whether the kernel for the rows' width expects another alignment."""
    return rows.shape[1] % _ALIGNMENT == 0 and bool(
        rows.stride(0) % _ALIGNMENT or rows.data_ptr() % _ALIGNMENT
    )


def _side_by_side(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
