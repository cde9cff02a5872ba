"""Refines rows by `GroupedRefinement` (kernels for many reward heads) and by ARGRE's equations.

A row is the last hidden state before `lm_head`; a reward head moves it along a direction and then
along its gradient. Heads are kept in slots. A tile is a few rows of one head that kernels process
together. The module imports torch, but not Triton.
"""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from steering.grouped_refinement import GroupedRefinement, RefinementKernels, tiles
from steering.reward import RewardHead, apply_reward

Rows = Sequence[tuple[int, int]]
"""Pairs of a slot and the number of consecutive rows that its head edits, in the rows' order."""


def use_few_programs(patch: pytest.MonkeyPatch, launches: ModuleType) -> None:
    """Make the kernels use large blocks: the interpreter's time grows with the programs' number."""
    patch.setattr(launches, "UNITS_BLOCK", {"block_units": 128, "block_columns": 64})
    patch.setattr(launches, "GRAM_BLOCK", {"block_units": 64, "block_columns": 256})
    patch.setattr(launches, "FINISH_BLOCK", {"block_units": 64, "block_columns": 128})
    patch.setattr(launches, "SPLITS", 2)


def filled(
    heads: Sequence[RewardHead], kernels: RefinementKernels, device: torch.device
) -> GroupedRefinement:
    """Return a refinement with the heads in slots from 1 on, in 16 slots."""
    refine = GroupedRefinement(16, device, kernels)
    for slot, head in enumerate(heads, 1):
        prepared = head.to(device).prepare().prepared
        assert prepared is not None
        refine.put(slot, prepared)
    return refine


def index_of(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two int32 tensors as in a route: each row's slot; the size of the tile it begins."""
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
    """Return the rows refined by their heads.

    Args:
        settings: direction scales, (n, 1), and step sizes, (n, most iterations).
        known: whether the host is given `rows`; otherwise only the device knows the heads.
    """
    return refine(h, rows if known else None, *index_of(rows, h.device), *settings)


def expected_of(
    heads: Sequence[RewardHead], h: Tensor, rows: Rows, settings: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the rows refined one head after another by `apply_reward`."""
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
    """Return settings that differ by row; some rows have no direction, no steps, or steps of 0."""
    row = torch.arange(count)
    scales = (row % 3) * 0.4
    steps = (row % (most + 1))[:, None]
    eta = (0.5 * (row % 5) / 4)[:, None]
    # Both are views of one table, as in a route.
    sizes = torch.where(torch.arange(most) < steps, eta, 0.0)
    table = torch.cat((scales[:, None], sizes), dim=1)
    return table[:, :1], table[:, 1:]


def flipping_head(width: int, units: int) -> RewardHead:
    """Return a head whose units all flip in each step of size 1 of a row that starts with 0.3.

    Half of the units are on where the row's first number is positive, half where it is negative,
    and each step changes that number's sign.
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
