"""Random interventions. Speed does not depend on what an intervention has learned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from steering.affine import AffineMap, Gate
from steering.reward import RewardHead

HEAD_UNITS: Final = 1024  # as in the paper (ARGRE, NeurIPS 2025)


def random_maps(
    widths: Mapping[str, int], seed: int, gated: bool = False
) -> Mapping[str, AffineMap]:
    """Return maps near the identity at some sites, so that activations stay finite.

    Args:
        widths: site -> width.
    """
    random = torch.Generator().manual_seed(seed)
    return {
        site: AffineMap(
            1 + 0.01 * torch.randn(width, generator=random),
            0.01 * torch.randn(width, generator=random),
            gate=_random_gate(width, random) if gated else None,
        )
        for site, width in widths.items()
    }


def _random_gate(width: int, random: torch.Generator) -> Gate:
    return Gate(torch.randn(width, generator=random) / width**0.5, torch.zeros(()))


def random_head(width: int, seed: int) -> RewardHead:
    """Return a reward head as wide as the paper's, as costly to refine by as a trained one.

    On hidden states whose numbers are about 1, a step of the paper's size changes the sign of some
    5 of the 1024 units.
    """
    random = torch.Generator().manual_seed(seed)
    return RewardHead(
        w1=torch.randn(HEAD_UNITS, width, generator=random) / width**0.5,
        b1=0.1 * torch.randn(HEAD_UNITS, generator=random),
        w2=0.6 * torch.randn(HEAD_UNITS, generator=random) / HEAD_UNITS**0.5,
        b2=torch.zeros(()),
        direction=0.01 * torch.randn(width, generator=random),
        positive_reward=torch.tensor(1.0),
    )


def permuted_head(head: RewardHead, seed: int) -> RewardHead:
    """Return a head that computes the same, with its units in another order, in its own memory."""
    order = torch.randperm(len(head.w1), generator=torch.Generator().manual_seed(seed))
    return replace(head, w1=head.w1[order], b1=head.b1[order], w2=head.w2[order], prepared=None)
