"""Triton kernels that multiply rows by reward heads' matrices, read once for all rows of a tile.

A tile is a few consecutive rows with the same head. Each tile has one program for each block of its
output. A program whose row begins no tile does nothing.

The order of every sum depends only on the head: a row's bits do not depend on the other rows of its
tile, nor on their number.

Import it only where there is a GPU: `triton` is not installed everywhere.
"""

import triton
import triton.language as tl

from steering.kernels.reward_table import (
    B1,
    DIRECTION,
    GRAM,
    UNITS,
    W1,
    WIDTH,
    head_of,
    size_of,
    tensor_of,
)


@triton.jit(do_not_specialize_on_alignment=["slots", "tile_sizes"])
def units_kernel(
    units,  # (n, max_units) float32, W1 h + b1
    table,  # (slots, 9) int64
    h,  # (n, width) float32
    slots,  # (n,) int32
    tile_sizes,  # (n,) int32
    width,
    max_units,
    tile_rows: tl.constexpr,
    block_units: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(tile_sizes + row)
    head = head_of(table, slots, row)
    m = size_of(head, UNITS)
    d = size_of(head, WIDTH)
    first_unit = tl.program_id(1) * block_units
    if (count == 0) | (first_unit >= m):
        return
    unit = first_unit + tl.arange(0, block_units)[:, None, None]
    member = tl.arange(0, tile_rows)[None, :, None]
    weights = tensor_of(head, W1) + unit.to(tl.int64) * d
    rows = h + (row + member) * width
    sums = tl.zeros([block_units, tile_rows, block_columns], dtype=tl.float32)
    for first in tl.range(0, d, block_columns, num_stages=stages):
        column = first + tl.arange(0, block_columns)[None, None, :]
        weight = tl.load(weights + column, mask=(unit < m) & (column < d), other=0.0)
        x = tl.load(rows + column, mask=(member < count) & (column < width), other=0.0)
        sums += weight * x
    bias = tl.load(tensor_of(head, B1) + unit, mask=unit < m, other=0.0)
    at = units + (row + member) * max_units + unit
    result = tl.sum(sums, 2, keep_dims=True) + bias
    tl.store(at, result, mask=(member < count) & (unit < m))


@triton.jit
def _mixed(
    factors,  # (count, stride) float32
    weights,  # (units, width) float32, one row for each unit
    first_unit,
    end,
    column,
    count,
    stride,
    width,
    tile_rows: tl.constexpr,
    block_units: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
):
    """Return factors @ weights over units first_unit to end: (1, tile_rows, block_columns)."""
    member = tl.arange(0, tile_rows)[None, :, None]
    sums = tl.zeros([block_units, tile_rows, block_columns], dtype=tl.float32)
    for first in tl.range(first_unit, end, block_units, num_stages=stages):
        unit = first + tl.arange(0, block_units)[:, None, None]
        real = (member < count) & (unit < end)
        factor = tl.load(factors + member * stride + unit, mask=real, other=0.0)
        used = tl.max(tl.where(factor == 0, 0, 1), 1, keep_dims=True) > 0
        at = weights + unit.to(tl.int64) * width + column
        sums += factor * tl.load(at, mask=used & (column < width), other=0.0)
    return tl.sum(sums, 0, keep_dims=True)


@triton.jit(do_not_specialize_on_alignment=["slots", "tile_sizes"])
def gram_slopes_kernel(
    gram_slopes,  # (n, splits, max_units) float32, partial sums of W1 W1^T slopes
    slopes,  # (n, max_units) float32
    table,  # (slots, 9) int64
    slots,  # (n,) int32
    tile_sizes,  # (n,) int32
    max_units,
    splits: tl.constexpr,
    tile_rows: tl.constexpr,
    block_units: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    count = tl.load(tile_sizes + row)
    head = head_of(table, slots, row)
    m = size_of(head, UNITS)
    first_column = tl.program_id(1) * block_columns
    if (count == 0) | (first_column >= m):
        return
    column = first_column + tl.arange(0, block_columns)[None, None, :]
    share = m // splits
    sums = _mixed(
        slopes + row * max_units,
        tensor_of(head, GRAM),
        split * share,
        (split + 1) * share,
        column,
        count,
        max_units,
        m,
        tile_rows,
        block_units,
        block_columns,
        stages,
    )
    member = tl.arange(0, tile_rows)[None, :, None]
    at = gram_slopes + ((row + member) * splits + split) * max_units + column
    tl.store(at, sums, mask=(member < count) & (column < m))


@triton.jit(do_not_specialize_on_alignment=["slots", "tile_sizes"])
def finish_kernel(
    refined,  # (n, width) float32
    h,  # (n, width) float32
    shifts,  # (n, 1) float32
    slope_sums,  # (n, max_units) float32
    table,  # (slots, 9) int64
    slots,  # (n,) int32
    tile_sizes,  # (n,) int32
    width,
    max_units,
    tile_rows: tl.constexpr,
    block_units: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = head_of(table, slots, row)
    m = size_of(head, UNITS)
    d = size_of(head, WIDTH)
    # A row without a head is in no tile, and is copied by its own program.
    count = tl.maximum(tl.load(tile_sizes + row), tl.where(m == 0, 1, 0))
    if count == 0:
        return
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[None, None, :]
    sums = _mixed(
        slope_sums + row * max_units,
        tensor_of(head, W1),
        0,
        m,
        column,
        count,
        max_units,
        d,
        tile_rows,
        block_units,
        block_columns,
        stages,
    )
    member = tl.arange(0, tile_rows)[None, :, None]
    real = (member < count) & (column < width)
    at = (row + member) * width + column
    x = tl.load(h + at, mask=real, other=0.0)
    shift = tl.load(shifts + row + member, mask=member < count, other=0.0)
    direction = tl.load(tensor_of(head, DIRECTION) + column, mask=column < d, other=0.0)
    # Adding 0 would turn -0.0 into +0.0.
    x = tl.where(shift == 0, x, x + shift * direction)
    x = tl.where(sums == 0, x, x + sums)
    tl.store(refined + at, x, mask=real)
