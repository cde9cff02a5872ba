"""Compares the GPU kernels of reward edits with the equations before the kernels are used."""

import importlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.model.fallback import fall_back
from steering.grouped_refinement import GroupedRefinement, RefinementKernels, tiles
from steering.reward import RewardHead, apply_reward

_KERNELS: Final = "steering.kernels.reward_triton"  # by name: Triton is not installed everywhere
_UNITS: Final = (200, 1024)  # hidden units of the two heads that are tried; ARGRE's have 1024
# The rows of each head in each trial: few and many, of both heads and of one.
_ROWS: Final = ((1, 6), (5, 0), (2, 0))
_STEPS: Final = 3
# The largest relative difference, in the norm, of a row's edit. Rounding may make a unit near zero
# flip a step earlier or later, which differs by less; kernels that miss every flip differ by more.
_TOLERANCE: Final = 0.05


class WrongRefinementError(ArithmeticError):
    """The kernels' edits of rows differ from the equations."""


def make_grouped_refinement(
    slots: int, width: int, device: torch.device, units: Sequence[int] = _UNITS
) -> GroupedRefinement | None:
    """Make the refinement of rows on a device; if its kernels fail the check, warn and return None.

    Args:
        slots: the number of the bank's slots, slot 0 included.
        width: the width of the rows.
        units: the numbers of hidden units of the two heads that are tried.

    Raises:
        ModelLoadError: the device has failed, and computes nothing any more.
    """
    try:
        kernels: RefinementKernels = importlib.import_module(_KERNELS)
        _check(kernels, width, units, device)
    except Exception as error:
        fall_back(error, device, "rewards' kernels", "rewards run without kernels, which is slower")
        return None
    return GroupedRefinement(slots, device, kernels)


@torch.inference_mode()
def _check(
    kernels: RefinementKernels, width: int, units: Sequence[int], device: torch.device
) -> None:
    """Raise WrongRefinementError unless the kernels edit rows as the equations do."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    heads = [
        RewardHead(
            w1=numbers(each, width) / width**0.5,
            b1=numbers(each),
            w2=numbers(each) / each**0.5,
            b2=numbers(),
            direction=numbers(width),
            positive_reward=numbers(),
        ).prepare()
        for each in units
    ]
    refine = GroupedRefinement(1 + len(heads), device, kernels)
    for slot, head in enumerate(heads, 1):
        assert head.prepared is not None
        refine.put(slot, head.prepared)
    for rows in _ROWS:
        n = sum(rows)
        known = [(slot, count) for slot, count in enumerate(rows, 1) if count]
        slots, tile_sizes = (
            torch.tensor(each, dtype=torch.int32, device=device) for each in tiles(known)
        )
        h = numbers(n, width)
        scales = torch.arange(n, dtype=torch.float32, device=device)[:, None] % 2
        sizes = torch.full((n, _STEPS), 0.5, device=device)
        refined = refine(h, known, slots, tile_sizes, scales, sizes)
        own = slice(0, rows[0]), slice(rows[0], n)
        expected = torch.cat(
            [
                apply_reward(h[each], head, scales[each], sizes[each])
                for head, each in zip(heads, own, strict=True)
            ]
        )
        difference = (refined - expected).norm(dim=1) / (expected - h).norm(dim=1)
        worst = float(difference.max())
        if not worst < _TOLERANCE:  # true for NaN, too
            raise WrongRefinementError(f"a row's edit is off by {worst:.2g}")
