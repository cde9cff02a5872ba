"""Triton kernels that update rows' units u = W1 h + b1, given as input; one program for each row.

The order of every sum depends only on the head and on `max_units`: a row's bits do not depend on
the other rows.

Import it only where there is a GPU: `triton` is not installed everywhere.
"""

import triton
import triton.language as tl

from steering.kernels.reward_table import (
    GRAM,
    TARGET,
    UNITS,
    W1_DIRECTION,
    W2,
    head_of,
    size_of,
    tensor_of,
)


@triton.jit(do_not_specialize=["scales_stride"], do_not_specialize_on_alignment=["slots", "scales"])
def directional_step_kernel(
    slopes,  # (n, max_units) float32, 1[u > 0] * w2
    shifts,  # (n, 1) float32, each row's multiple of its head's direction
    units,  # (n, max_units) float32, updated in place
    table,  # (slots, 9) int64
    slots,  # (n,) int32
    scales,  # (n, 1) float32
    scales_stride,
    max_units,
    block_units: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = head_of(table, slots, row)
    m = size_of(head, UNITS)
    unit = tl.arange(0, block_units)
    own = unit < m
    at = row * max_units + unit
    u = tl.load(units + at, mask=own, other=0.0)
    w2 = tl.load(tensor_of(head, W2) + unit, mask=own, other=0.0)
    # `<= 0` is false for NaN: a NaN unit counts as active and a NaN gap moves the row, so that NaN
    # is not hidden.
    reward = tl.sum(tl.where(u <= 0, 0.0, u * w2), 0)
    gap = tl.load(tensor_of(head, TARGET), mask=m > 0, other=0.0) - reward
    scale = tl.load(scales + row * scales_stride)
    shift = tl.where((gap <= 0) | (scale == 0), 0.0, scale * gap)
    w1_direction = tl.load(tensor_of(head, W1_DIRECTION) + unit, mask=own, other=0.0)
    u = tl.where(shift == 0, u, u + shift * w1_direction)
    tl.store(shifts + row, shift)
    tl.store(units + at, u, mask=own)
    tl.store(slopes + at, tl.where(u <= 0, 0.0, w2), mask=own)


@triton.jit(
    do_not_specialize=["most", "sizes_stride"], do_not_specialize_on_alignment=["slots", "sizes"]
)
def ascend_kernel(
    slope_sums,  # (n, max_units) float32, the sum of eta * slopes over all steps
    units,  # (n, max_units) float32
    gram_slopes,  # (n, splits, gram_slopes_stride) float32, partial sums of W1 W1^T slopes
    table,  # (slots, 9) int64
    slots,  # (n,) int32
    sizes,  # (n, most) float32, eta for each of a row's iterations, then 0
    sizes_stride,
    most,
    max_units,
    gram_slopes_stride,
    splits: tl.constexpr,
    block_units: tl.constexpr,
    block_flips: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = head_of(table, slots, row)
    m = size_of(head, UNITS)
    weights = tensor_of(head, W2)
    gram = tensor_of(head, GRAM)
    unit = tl.arange(0, block_units)
    own = unit < m
    at = row * max_units + unit
    u = tl.load(units + at, mask=own, other=0.0)
    w2 = tl.load(weights + unit, mask=own, other=0.0)
    part = (row * splits + tl.arange(0, splits)[:, None]) * gram_slopes_stride + unit[None]
    moves = tl.sum(tl.load(gram_slopes + part, mask=own[None], other=0.0), 0)
    on = tl.where(u <= 0, 0, 1)
    steps = tl.zeros([block_units], dtype=tl.float32)
    step = 0
    eta = tl.load(sizes + row * sizes_stride, mask=most > 0, other=0.0)
    while eta != 0:
        now = tl.where(u <= 0, 0, 1)
        flipped = tl.where((now != on) & (w2 != 0), 1, 0)
        on = now
        rank = tl.where(flipped == 1, tl.cumsum(flipped, 0), 0)
        flips = tl.sum(flipped, 0)
        for first in range(0, flips, block_flips):
            place = first + 1 + tl.arange(0, block_flips)
            # Find each place's unit, and whether it is on now, in one sum: 2 * unit + on.
            code = tl.sum(tl.where(rank[None] == place[:, None], 2 * unit + now, 0), 1)
            real = place <= flips
            change = tl.load(weights + code // 2, mask=real, other=0.0)
            change = tl.where(code % 2 == 1, change, -change)
            others = gram + (code // 2).to(tl.int64)[:, None] * m + unit[None]
            moved = tl.load(others, mask=real[:, None] & own[None], other=0.0)
            moves += tl.sum(change[:, None] * moved, 0)
        steps += tl.where(on == 1, eta * w2, 0.0)
        u += eta * moves
        step += 1
        eta = tl.load(sizes + row * sizes_stride + step, mask=step < most, other=0.0)
    tl.store(slope_sums + at, steps, mask=own)
