"""What refines rows by reward heads on a GPU, held against the equations before it is used."""

import importlib
import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.devices import is_dead
from server.engine.torch.loader import ModelLoadError
from steering.grouped_refinement import GroupedRefinement, RefinementKernels, tiles
from steering.reward import RewardHead, apply_reward

logger = logging.getLogger(__name__)

_KERNELS: Final = "steering.kernels.reward_triton"  # Triton is not installed everywhere
_UNITS: Final = (200, 1024)  # of the heads that are tried; the second is as ARGRE has it
# Rows of each head: few and many, of both heads and of one.
_ROWS: Final = ((1, 6), (5, 0), (2, 0))
_STEPS: Final = 3
# Of a row's edit. A unit that is zero but for rounding may pass a step earlier or later, which is
# less; that no unit's passing were seen would be more.
_TOLERANCE: Final = 0.05


class WrongRefinementError(ArithmeticError):
    """Rows get something else than the equations give."""


def make_grouped_refinement(
    slots: int, width: int, device: torch.device, units: Sequence[int] = _UNITS
) -> GroupedRefinement | None:
    """Give what refines rows on a device; None, with a warning, where it does not do so rightly.

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
        if is_dead(device):
            raise ModelLoadError(f"the GPU failed in rewards' kernels: {error}") from error
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        logger.warning("rewards run without kernels, which is slower: %s", reason)
        logger.debug("refining rows by kernels failed", exc_info=True)
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
