"""Affine edits of a site: `z <- z + strength * gate * ((weight - 1) * z + bias)`.

LinEAS (Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional
Loss", NeurIPS 2025) writes the same as `strength * T(z) + (1 - strength) * z`, `T(z) = weight * z +
bias`, without a gate. Lin-AcT, mean shift and CAA vectors are the same form with other parameters.
A gate scales the edit of each token by `sigmoid(a . z + c)` (DSAS, arXiv 2512.03661).

This is the arithmetic of `steerserve::affine_edit` in torch; `kernels/affine_triton.py` has the
same in Triton, for GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steering.dose import relative_change

# Bits of `MapTable.held`: what a slot's map at a site consists of.
HAS_MAP: Final = 1
HAS_SUPPORT: Final = 2
HAS_GATE: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Scales a map's edit of a token z by `sigmoid(weight . z + bias)` (DSAS)."""

    weight: Tensor  # (d,) float32
    bias: Tensor  # () float32


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """One site's map, of width d. A coordinate outside `[low, high]` is left alone (Lin-AcT)."""

    weight: Tensor  # (d,) float32
    bias: Tensor  # (d,) float32
    low: Tensor | None = None  # (d,) float32
    high: Tensor | None = None  # (d,) float32
    gate: Gate | None = None


AffineParameters: TypeAlias = Mapping[str, AffineMap]
"""Site -> its map."""


class MapTable(NamedTuple):
    """The maps that a bank's slots hold at one site of width d, as an edit reads them."""

    held: Tensor  # (slots,) int32: HAS_MAP, and HAS_SUPPORT and HAS_GATE where the map has them
    delta: Tensor  # (slots, d) float32, weight - 1
    bias: Tensor  # (slots, d) float32
    low: Tensor | None  # (slots, d) float32, -inf without a support; None where no map has one
    high: Tensor | None  # (slots, d) float32, inf without a support
    gate_weight: Tensor | None  # (slots, d) float32; None where no map has a gate
    gate_bias: Tensor | None  # (slots,) float32

    def to(self, device: torch.device) -> "MapTable":
        """The same on a device."""
        held, delta, bias = (each.to(device) for each in self[:3])
        return MapTable(
            held, delta, bias, *(None if each is None else each.to(device) for each in self[3:])
        )


def edit_tokens(z: Tensor, slots: Tensor, strength: Tensor, table: MapTable) -> Tensor:
    """Edit n tokens, each by the map of its slot; a slot without a map leaves its tokens alone.

    Args:
        z: (n, d) float32, the site's activations.
        slots: (n,) int64.
        strength: (n,) float32.

    Returns:
        (n, d) float32, bit for bit `z` where there is no map.
    """
    held, strength = table.held[slots][:, None], strength[:, None]
    if table.gate_weight is not None and table.gate_bias is not None:
        # A map without a gate acts as it does where no map has one, to the bit.
        gates = gate_of(z, table.gate_weight[slots], table.gate_bias[slots])
        strength = torch.where((held & HAS_GATE) != 0, strength * gates, strength)
    edited = torch.addcmul(z, strength, torch.addcmul(table.bias[slots], table.delta[slots], z))
    acts = held != 0
    if table.low is not None and table.high is not None:
        acts = acts & (z >= table.low[slots]) & (z <= table.high[slots])
    return torch.where(acts, edited, z)


def gate_of(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`sigmoid(weight . z + bias)` of each token: (n, d), (n, d) or (1, d), (n,) -> (n, 1)."""
    return torch.sigmoid((z * weight).sum(-1, keepdim=True) + bias[:, None])


def edit_stacks(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    """Edit n tokens, each by the maps of its stack, one after the other.

    Args:
        activations: (n, d), any floating dtype.
        slots: (depth, n) int64.
        strength: (depth, n) float32.
        doses: (2, depth, n) float32: each edit's dose (see `relative_change`) is added to the
            first half, and how many edits acted on the token to the second.

    Returns:
        (n, d) of the same dtype: a whole stack is computed in float32 and cast back once.
    """
    z = activations.float()
    for place in range(len(slots)):
        edited = edit_tokens(z, slots[place], strength[place], table)
        if doses is not None:
            acts = table.held[slots[place]] != 0
            doses[0, place] += torch.where(acts, relative_change(z, edited), 0)
            doses[1, place] += acts
        z = edited
    return z.to(activations.dtype)
