"""Launches the Triton kernels of `GroupedRefinement`; this module is a `RefinementKernels`.

Shapes and launch grids depend only on the numbers of rows and of gradient steps, on the width and
on `max_units`. All else that differs from one decode step to the next is in tensors, so that a CUDA
graph can hold the launches.

Import it only where it is used: `triton` is not installed everywhere.
"""

from typing import Final

import torch
import triton
from torch import Tensor

from steering.grouped_refinement import TILE_ROWS, HeadLookup
from steering.kernels.reward_rows import ascend_kernel, directional_step_kernel
from steering.kernels.reward_tiles import finish_kernel, gram_slopes_kernel, units_kernel

# Block sizes: 2048 numbers for each row of a tile, i.e. 16 for each of the 128 threads.
UNITS_BLOCK: Final = {"block_units": 8, "block_columns": 256}
GRAM_BLOCK: Final = {"block_units": 32, "block_columns": 64}
FINISH_BLOCK: Final = {"block_units": 64, "block_columns": 32}
TILE_WARPS: Final = 4
# Stages of the loads' software pipeline. `reward_tiles._mixed` skips rows of a block whose weights
# are 0, so that its loads are shorter, and more of them are in flight.
UNITS_STAGES: Final = 3
MIXED_STAGES: Final = 4
SPLITS: Final = 8  # programs that share the sum over units in W1 W1^T slopes
FLIPS: Final = 16  # units that pass zero in a step, whose rows of W1 W1^T are added at once


def units(h: Tensor, heads: HeadLookup, max_units: int) -> Tensor:
    """See `RefinementKernels`."""
    n, width = h.shape
    output = h.new_empty(n, max_units)
    units_kernel[(n, triton.cdiv(max_units, UNITS_BLOCK["block_units"]))](
        output,
        heads.table,
        h,
        heads.slots,
        heads.tile_sizes,
        width,
        max_units,
        tile_rows=TILE_ROWS,
        **UNITS_BLOCK,
        stages=UNITS_STAGES,
        num_warps=TILE_WARPS,
    )
    return output


def directional_step(
    units: Tensor, heads: HeadLookup, direction_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `RefinementKernels`."""
    n, max_units = units.shape
    slopes, shifts = torch.empty_like(units), units.new_empty(n, 1)
    block = triton.next_power_of_2(max_units)
    directional_step_kernel[(n,)](
        slopes,
        shifts,
        units,
        heads.table,
        heads.slots,
        direction_scale,
        direction_scale.stride(0),
        max_units,
        block_units=block,
        num_warps=row_warps(block),
    )
    return slopes, shifts


def gram_slopes(slopes: Tensor, heads: HeadLookup) -> Tensor:
    """See `RefinementKernels`."""
    n, max_units = slopes.shape
    output = slopes.new_empty(n, SPLITS, max_units)
    gram_slopes_kernel[(n, triton.cdiv(max_units, GRAM_BLOCK["block_columns"]), SPLITS)](
        output,
        slopes,
        heads.table,
        heads.slots,
        heads.tile_sizes,
        max_units,
        splits=SPLITS,
        tile_rows=TILE_ROWS,
        **GRAM_BLOCK,
        stages=MIXED_STAGES,
        num_warps=TILE_WARPS,
    )
    return output


def ascend(units: Tensor, gram_slopes: Tensor, heads: HeadLookup, step_sizes: Tensor) -> Tensor:
    """See `RefinementKernels`."""
    n, max_units = units.shape
    output = torch.empty_like(units)
    block = triton.next_power_of_2(max_units)
    assert step_sizes.stride(1) == 1, "a row's steps lie side by side"
    ascend_kernel[(n,)](
        output,
        units,
        gram_slopes,
        heads.table,
        heads.slots,
        step_sizes,
        step_sizes.stride(0),
        step_sizes.shape[1],
        max_units,
        gram_slopes.shape[2],
        splits=gram_slopes.shape[1],
        block_units=block,
        block_flips=FLIPS,
        num_warps=row_warps(block),
    )
    return output


def finish(h: Tensor, shifts: Tensor, slope_sums: Tensor, heads: HeadLookup) -> Tensor:
    """See `RefinementKernels`."""
    n, width = h.shape
    output = torch.empty_like(h)
    finish_kernel[(n, triton.cdiv(width, FINISH_BLOCK["block_columns"]))](
        output,
        h,
        shifts,
        slope_sums,
        heads.table,
        heads.slots,
        heads.tile_sizes,
        width,
        slope_sums.shape[1],
        tile_rows=TILE_ROWS,
        **FINISH_BLOCK,
        stages=MIXED_STAGES,
        num_warps=TILE_WARPS,
    )
    return output


def row_warps(block_units: int) -> int:
    """Return the number of warps for a row's units: 4 units a thread, up to 16 warps."""
    return max(1, min(16, block_units // 128))
