"""Rows refined by `GroupedRefinement`, and by the equations. Needs no more than torch."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from steering.grouped_refinement import GroupedRefinement, RefinementKernels, tiles
from steering.reward import RewardHead, apply_reward

Rows = Sequence[tuple[int, int]]
"""Slots, and how many rows each one's head edits, after the rows of the head before it."""


def use_few_programs(patch: pytest.MonkeyPatch, launches: ModuleType) -> None:
    """Have kernels use large blocks: the interpreter's time is a program's, not a number's."""
    patch.setattr(launches, "UNITS_BLOCK", {"block_units": 128, "block_columns": 64})
    patch.setattr(launches, "MOTION_BLOCK", {"block_units": 64, "block_columns": 256})
    patch.setattr(launches, "FINISH_BLOCK", {"block_units": 64, "block_columns": 128})
    patch.setattr(launches, "SPLITS", 2)


def filled(
    heads: Sequence[RewardHead], kernels: RefinementKernels, device: torch.device
) -> GroupedRefinement:
    """Heads in slots from 1 on; slots 0 and 15 are empty."""
    refine = GroupedRefinement(16, device, kernels)
    for slot, head in enumerate(heads, 1):
        prepared = head.to(device).prepare().prepared
        assert prepared is not None
        refine.put(slot, prepared)
    return refine


def index_of(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots and counts, as a route has them."""
    slots, tile_sizes = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in tiles(rows)
    )
    return slots, tile_sizes


def refined_by(
    refine: GroupedRefinement,
    h: Tensor,
    rows: Rows,
    settings: tuple[Tensor, Tensor],
    known: bool = False,
) -> Tensor:
    """Rows refined.

    Args:
        settings: (n, 1), direction scales; and (n, most), step sizes.
        known: whether the host knows whose rows they are.
    """
    return refine(h, rows if known else None, *index_of(rows, h.device), *settings)


def expected_of(
    heads: Sequence[RewardHead], h: Tensor, rows: Rows, settings: tuple[Tensor, Tensor]
) -> Tensor:
    """The same, head after head."""
    expected = []
    first = 0
    for slot, count in rows:
        own = slice(first, first + count)
        first = own.stop
        scales, sizes = settings
        head = heads[slot - 1].to(h.device)
        expected.append(apply_reward(h[own], head, scales[own], sizes[own]))
    return torch.cat(expected)


def random_rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def mixed_settings(count: int, most: int = 6) -> tuple[Tensor, Tensor]:
    """Different settings of rows, some of which have no direction, no steps, or steps of 0."""
    row = torch.arange(count)
    scales = (row % 3) * 0.4
    steps = (row % (most + 1))[:, None]
    eta = (0.5 * (row % 5) / 4)[:, None]
    # Parts of one table, as a route has them.
    sizes = torch.where(torch.arange(most) < steps, eta, 0.0)
    table = torch.cat((scales[:, None], sizes), dim=1)
    return table[:, :1], table[:, 1:]


def flipping_head(width: int, units: int) -> RewardHead:
    """A head all of whose units flip in each step of 1, of rows whose first number is 0.3.

    Half are on where that is above 0, half where it is below, and each step goes past it.
    """
    w1 = torch.zeros(units, width)
    w1[:, 0] = torch.tensor([1.0, -1.0]).repeat(units // 2)
    return RewardHead(
        w1=w1,
        b1=torch.zeros(units),
        w2=torch.full((units,), -2 / units),
        b2=torch.zeros(()),
        direction=torch.zeros(width),
        positive_reward=torch.zeros(()),
    )
