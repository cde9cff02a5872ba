"""Edits that an engine's self-test applies, to see whether they reach the logits."""

from dataclasses import replace

import torch

from steering.affine import AffineMap, Gate
from steering.reward import RewardHead


def probe_map(width: int) -> AffineMap:
    """Return a map far from the identity: it negates and shifts."""
    return AffineMap(weight=torch.full((width,), -1.0), bias=torch.linspace(-1.0, 1.0, width))


def complete_map(width: int) -> AffineMap:
    """Return a probe's map with both optional parts that a map may have: a support and a gate."""
    bound = torch.full((width,), 1e4)
    gate = Gate(torch.linspace(-1.0, 1.0, width) / width, torch.zeros(()))
    return replace(probe_map(width), low=-bound, high=bound, gate=gate)


def probe_head(width: int) -> RewardHead:
    """Return a head that gives every row a gap of 10: r(h) is 1, and r_plus is 11."""
    return RewardHead(
        w1=torch.zeros(1, width),
        b1=torch.ones(1),
        w2=torch.ones(1),
        b2=torch.zeros(()),
        direction=torch.linspace(-1.0, 1.0, width),
        positive_reward=torch.tensor(11.0),
    )
