"""Compares the GPU kernels of reward edits with the equations before the kernels are used."""

import importlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.model.fallback import fall_back
from steering.grouped_refinement import GroupedRefinement, RefinementKernels, tiles
from steering.reward import RewardHead, apply_reward

_KERNELS: Final = "steering.kernels.reward_triton"  # Triton is not installed everywhere
_UNITS: Final = (200, 1024)  # of the heads that are tried; the second is as ARGRE has it
# Rows of each head: few and many, of both heads and of one.
_ROWS: Final = ((1, 6), (5, 0), (2, 0))
_STEPS: Final = 3
# How far a row's edit may be off, in the norm. A unit that is zero but for rounding may flip a step
# earlier or later, which is less than this; to miss every flip is more.
_TOLERANCE: Final = 0.05


class WrongRefinementError(ArithmeticError):
    """The kernels edit rows otherwise than the equations do."""


def make_grouped_refinement(
    slots: int, width: int, device: torch.device, units: Sequence[int] = _UNITS
) -> GroupedRefinement | None:
    """Make the refinement of rows on a device; None, with a warning, where its kernels are wrong.

    Args:
        slots: of heads, and of no head.
        width: of the rows.
        units: of two heads that are tried.

    Raises:
        ModelLoadError: the device failed, and computes nothing any more.
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
    """Raise WrongRefinementError unless rows of heads get what the equations give."""
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
        slots, counts = (
            torch.tensor(each, dtype=torch.int32, device=device) for each in tiles(known)
        )
        h = numbers(n, width)
        scales = torch.arange(n, dtype=torch.float32, device=device)[:, None] % 2
        sizes = torch.full((n, _STEPS), 0.5, device=device)
        refined = refine(h, known, slots, counts, scales, sizes)
        own = slice(0, rows[0]), slice(rows[0], n)
        expected = torch.cat(
            [
                apply_reward(h[each], head, scales[each], sizes[each])
                for head, each in zip(heads, own, strict=True)
            ]
        )
        difference = (refined - expected).norm(dim=1) / (expected - h).norm(dim=1)
        worst = float(difference.max())
        if not worst < _TOLERANCE:  # also where it is not a number
            raise WrongRefinementError(f"a row's edit is off by {worst:.2g}")
