"""Sparse group lasso of LinEAS maps: the proximal step, and the support that it leaves.

At a site of width d, `w - 1` and `b` are a group each. After each optimizer step, with
tau = (the step's learning rate) * gamma, each group x becomes

    x <- sign(x) relu(|x| - tau lambda_1)                        each coordinate
    x <- relu(1 - tau lambda_group sqrt(d) / ||x||_2) x          the group; 0 where ||x||_2 = 0

The learning rate in tau is the convention of the authors' code. Algorithm 1 of the paper writes
gamma alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.affine import AffineMap, AffineParameters


@dataclass(frozen=True, slots=True)
class Support:
    """The number of sites and coordinates that maps act on.

    A coordinate counts if its weight is not 1 or its bias is not 0, a site if one of its
    coordinates does.
    """

    sites_fitted: int
    sites_kept: int
    coordinates_fitted: int
    coordinates_kept: int


def proximal_step(x: Tensor, tau: float, lambda_1: float, lambda_group: float) -> Tensor:
    """Return the module's proximal step of one group.

    Args:
        x: (d,) float32: `w - 1`, or `b`.
        tau: the step's size; nothing changes at 0.
        lambda_1: weight of the lasso, which takes coordinates away.
        lambda_group: weight of the group lasso, which takes the group away.

    Returns:
        (d,) float32, with exact zeros for what was taken away.
    """
    x = x.sign() * torch.relu(x.abs() - tau * lambda_1)
    norm = x.norm()
    scale = torch.relu(1 - tau * lambda_group * math.sqrt(x.numel()) / norm)
    return torch.where(norm > 0, scale * x, torch.zeros_like(x))


def acts(map_: AffineMap) -> Tensor:
    """Return which coordinates a map changes: (d,) bool."""
    return (map_.weight != 1) | (map_.bias != 0)


def support_of(maps: AffineParameters) -> Support:
    """Return the number of sites and coordinates that maps act on."""
    kept = [int(acts(map_).sum()) for map_ in maps.values()]
    return Support(
        sites_fitted=len(maps),
        sites_kept=sum(count > 0 for count in kept),
        coordinates_fitted=sum(map_.weight.numel() for map_ in maps.values()),
        coordinates_kept=sum(kept),
    )
