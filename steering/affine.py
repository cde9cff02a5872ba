"""Affine edits of a site's output: `z <- z + strength * ((weight - 1) * z + bias)`.

LinEAS (Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional
Loss", NeurIPS 2025) writes the same as `strength * T(z) + (1 - strength) * z`, `T(z) = weight * z +
bias`. Lin-AcT, mean shift and CAA vectors are the same form with other parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """One site's map, of width d. A coordinate outside `[low, high]` is left alone (Lin-AcT)."""

    weight: Tensor  # (d,) float32
    bias: Tensor  # (d,) float32
    low: Tensor | None = None  # (d,) float32
    high: Tensor | None = None  # (d,) float32


AffineParameters: TypeAlias = Mapping[str, AffineMap]
"""Module path of a site -> its map."""


def apply_affine(
    z: Tensor,
    delta: Tensor,
    bias: Tensor,
    strength: Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """Edit n tokens, each by its own map.

    Args:
        z: (n, d) float32, the site's output.
        delta: (n, d) or (1, d) float32, `weight - 1`.
        bias: (n, d) or (1, d) float32.
        strength: (n, 1) float32.
        low, high: (n, d) or (1, d) float32, the support; both None where no map has one.

    Returns:
        (n, d) float32.
    """
    edited = torch.addcmul(z, strength, torch.addcmul(bias, delta, z))
    if low is None or high is None:
        return edited
    return torch.where((z >= low) & (z <= high), edited, z)


def edit_tokens(
    z: Tensor,
    slots: Tensor,
    strength: Tensor,
    *,
    present: Tensor,
    delta: Tensor,
    bias: Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """Edit n tokens, each by the map of its slot; a slot without a map leaves its tokens alone.

    Args:
        z: (n, d) float32, the site's output.
        slots: (n,) int64; `strength`: (n, 1) float32.
        present: (slots, 1) bool, whether a slot has a map at this site.
        delta, bias: (slots, d) float32; `low`, `high`: the same, or both None.

    Returns:
        (n, d) float32, bit for bit `z` where there is no map.
    """
    edited = apply_affine(
        z,
        delta=delta[slots],
        bias=bias[slots],
        strength=strength,
        low=None if low is None else low[slots],
        high=None if high is None else high[slots],
    )
    return torch.where(present[slots], edited, z)
