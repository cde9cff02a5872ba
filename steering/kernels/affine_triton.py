"""A site's affine edits as a Triton kernel: one launch a site, whatever its tokens are steered by.

A program has one token's row in registers and edits it by one map after the other, so that a gate
sees the whole row, and that activations are read and written once. What it does depends on the
contents of its inputs only, so a CUDA graph can hold it.

Imported where there is a GPU only: `triton` is not installed everywhere.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from steering.affine import HAS_GATE, HAS_SUPPORT, MapTable
from steering.dose import LARGEST

_HAS_SUPPORT: Final = tl.constexpr(HAS_SUPPORT)
_HAS_GATE: Final = tl.constexpr(HAS_GATE)
_LARGEST_DOSE: Final = tl.constexpr(LARGEST)

_ALIGNMENT: Final = 16  # of addresses (bytes) and strides (numbers) that are read in large pieces
_NUMBERS_OF_A_THREAD: Final = 16  # of a row: with its map's, they take about 90 registers
_FEWEST_WARPS: Final = 4  # of a program
_MOST_WARPS: Final = 32
_WARP: Final = 32  # threads
_WIDE: Final = 8192  # numbers of a row; beyond, a program has threads of 64 registers only


@triton.jit
def _edit_row(
    z,  # (block,) float32
    scale,  # the strength
    slot,
    has,  # what it holds
    delta,
    bias,
    low,
    high,
    gate_weight,
    gate_bias,
    column,
    real,
    width: tl.constexpr,
    is_wide: tl.constexpr,
):
    at = slot * width + column
    # Before the branches, so that all is read at once, where registers suffice.
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
    return tl.where(dose < _LARGEST_DOSE, dose, _LARGEST_DOSE)  # which is so of NaN, too


# What differs from step to step, or from a graph's buffer to the next, must not make a kernel each.
@triton.jit(
    do_not_specialize=[
        *("slots", "strength", "held", "gate_bias", "doses", "depth"),
        *("row_stride", "slots_stride", "strength_stride", "doses_stride", "half_stride"),
    ]
)
def _edit_kernel(
    edited,  # (n, width), any floating dtype
    activations,  # (n, width) of the same dtype
    slots,  # (depth, n) int64
    strength,  # (depth, n) float32
    held,  # (slots,) int32
    delta,  # (slots, width) float32
    bias,  # (slots, width) float32
    low,  # (slots, width) float32; not read where no slot has a support
    high,  # the same
    gate_weight,  # (slots, width) float32; not read where no slot has a gate
    gate_bias,  # (slots,) float32; the same
    doses,  # (2, depth, n) float32; not read without `has_doses`
    depth,
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
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    real = column < width
    start = token * row_stride
    if is_aligned:
        start = tl.multiple_of(start, 16)
    row = tl.load(activations + start + column, mask=real, other=0.0)
    any_held = 0
    for place in range(depth):
        any_held |= tl.load(held + tl.load(slots + place * slots_stride + token))
    if any_held == 0:
        # Not by way of float32, which not all NaN survive.
        tl.store(edited + token * width + column, row, mask=real)
    else:
        z = row.to(tl.float32)
        for place in range(depth):
            slot = tl.load(slots + place * slots_stride + token)
            has = tl.load(held + slot)
            if has != 0:
                scale = tl.load(strength + place * strength_stride + token)
                after = _edit_row(
                    *(z, scale, slot, has, delta, bias, low, high, gate_weight, gate_bias),
                    *(column, real, width, is_wide),
                )
                if has_doses:
                    at_dose = doses + place * doses_stride + token
                    tl.store(at_dose, tl.load(at_dose) + _dose(z, after))
                    tl.store(at_dose + half_stride, tl.load(at_dose + half_stride) + 1.0)
                z = after
        tl.store(edited + token * width + column, z.to(edited.dtype.element_ty), mask=real)


def edit_stacks_triton(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    """Edit n tokens, each by the maps of its stack; see `edit_stacks`.

    A token's result depends on its own row, slots and strengths only, to the bit.
    """
    # Triton launches on the current device.
    with torch.cuda.device_of(activations):  # type: ignore[no-untyped-call]
        return _edit(activations, slots, strength, table, doses)


def _edit(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    tokens, width = activations.shape
    depth = len(slots)
    edited = torch.empty((tokens, width), dtype=activations.dtype, device=activations.device)
    if edited.numel() == 0:
        return edited
    assert slots.shape == strength.shape == (depth, tokens), "each token has its own stack"
    assert table.delta.shape[1] == width, "the maps are of this site"
    for each in table:
        assert each is None or each.is_contiguous(), "a slot's numbers lie side by side"
    activations = _readable(activations)
    slots, strength = _side_by_side(slots), _side_by_side(strength)
    half_stride = doses_stride = 0
    if doses is not None:
        assert doses.shape == (2, depth, tokens), "each edit of each token has its own dose"
        half_stride, doses_stride, token_stride = doses.stride()
        assert token_stride == 1, "doses of one place lie side by side"
    _edit_kernel[(tokens,)](
        edited,
        activations,
        slots,
        strength,
        table.held,
        table.delta,
        table.bias,
        # Any address stands for what no slot has.
        table.delta if table.low is None else table.low,
        table.delta if table.high is None else table.high,
        table.delta if table.gate_weight is None else table.gate_weight,
        table.delta if table.gate_bias is None else table.gate_bias,
        strength if doses is None else doses,
        depth,
        activations.stride(0),
        slots.stride(0),
        strength.stride(0),
        doses_stride,
        half_stride,
        **_constants(width, doses is not None),
        **_options(width),
    )
    return edited


def _constants(width: int, has_doses: bool) -> dict[str, int]:
    """What a kernel is compiled for."""
    block: int = triton.next_power_of_2(width)
    return {
        "width": width,
        "block": block,
        "is_aligned": width % _ALIGNMENT == 0,
        "is_wide": block > _WIDE,
        "has_doses": has_doses,
    }


def _options(width: int) -> dict[str, int]:
    """How it is compiled."""
    warps = triton.next_power_of_2(width) // (_WARP * _NUMBERS_OF_A_THREAD)
    return {
        "num_warps": min(_MOST_WARPS, max(_FEWEST_WARPS, warps)),
        "num_stages": 1,
        # What a compiler fuses may depend on what else a kernel computes: with doses, edits must
        # have the same bits.
        "enable_fp_fusion": False,
    }


def _readable(activations: Tensor) -> Tensor:
    """The same rows, which the kernel for their width can read."""
    activations = _side_by_side(activations)
    if activations.shape[1] % _ALIGNMENT == 0 and (
        activations.stride(0) % _ALIGNMENT or activations.data_ptr() % _ALIGNMENT
    ):
        # Where another kernel would read them, it might add up their gates in another order.
        return activations.clone(memory_format=torch.contiguous_format)
    return activations


def _side_by_side(tensor: Tensor) -> Tensor:
    """The same, with the numbers of its last dimension side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
