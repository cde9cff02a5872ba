"""Affine edits of a site: `z <- z + strength * gate * ((weight - 1) * z + bias)`.

LinEAS (Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional
Loss", NeurIPS 2025) writes this edit, without a gate, as `strength * T(z) + (1 - strength) * z`,
where `T(z) = weight * z + bias`. Lin-AcT, mean shift and CAA vectors have the same form and other
parameters. A gate scales the edit of each token by `sigmoid(a . z + c)` (DSAS, arXiv 2512.03661).

This module implements the operator `steerserve::affine_edit` in torch; `kernels/affine_triton.py`
implements it in Triton, for GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steering.dose import relative_change

# Bits of `MapTable.flags`, for the parts of a slot's map at a site. 0: the slot has no map there.
HAS_MAP: Final = 1
HAS_SUPPORT: Final = 2
HAS_GATE: Final = 4
ALL_MAPPED: Final = 8  # of several slots: each has a map at the site


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Scales a map's edit of a token z by `sigmoid(weight . z + bias)` (DSAS)."""

    weight: Tensor  # (d,) float32
    bias: Tensor  # () float32


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """One site's map, of width d. Leaves coordinates of z outside `[low, high]` alone (Lin-AcT)."""

    weight: Tensor  # (d,) float32
    bias: Tensor  # (d,) float32
    low: Tensor | None = None  # (d,) float32
    high: Tensor | None = None  # (d,) float32
    gate: Gate | None = None


AffineParameters: TypeAlias = Mapping[str, AffineMap]
"""Site -> its map."""


class MapTable(NamedTuple):
    """The maps of a bank's slots at one site of width d, stacked by slot."""

    flags: Tensor  # (slots,) int32, bits HAS_MAP, HAS_SUPPORT, HAS_GATE; 0 without a map
    delta: Tensor  # (slots, d) float32, weight - 1
    bias: Tensor  # (slots, d) float32
    low: Tensor | None  # (slots, d) float32, -inf in slots without support; None if none has any
    high: Tensor | None  # (slots, d) float32, inf in slots without support; None like `low`
    gate_weight: Tensor | None  # (slots, d) float32; None if no slot has a gate
    gate_bias: Tensor | None  # (slots,) float32; None like `gate_weight`

    def to(self, device: torch.device) -> "MapTable":
        """Return the table on a device."""
        flags, delta, bias = (each.to(device) for each in self[:3])
        return MapTable(
            flags, delta, bias, *(None if each is None else each.to(device) for each in self[3:])
        )


def edit_tokens(z: Tensor, slots: Tensor, strength: Tensor, table: MapTable) -> Tensor:
    """Edit n tokens, each by its slot's map. Tokens of a slot without a map stay unchanged.

    Args:
        z: (n, d) float32, the site's activations.
        slots: (n,) int64, each token's slot in the bank.
        strength: (n,) float32.
        table: the site's maps.

    Returns:
        (n, d) float32; rows without a map equal `z` bit for bit.
    """
    has_map = (table.flags[slots] != 0)[:, None]
    return torch.where(has_map, edit_mapped_tokens(z, slots, strength, table), z)


def edit_mapped_tokens(z: Tensor, slots: Tensor, strength: Tensor, table: MapTable) -> Tensor:
    """Do what `edit_tokens` does, to the bit, if every token's slot has a map."""
    strength = strength.unsqueeze(1)
    if table.gate_weight is not None and table.gate_bias is not None:
        # By `where`, so that a map without a gate gives the same bits as in a table without gates.
        has_gate = ((table.flags[slots] & HAS_GATE) != 0)[:, None]
        gates = gate_of(z, table.gate_weight[slots], table.gate_bias[slots])
        strength = torch.where(has_gate, strength * gates, strength)
    delta, bias = table.delta.index_select(0, slots), table.bias.index_select(0, slots)
    edited = torch.addcmul(z, strength, torch.addcmul(bias, delta, z))
    if table.low is not None and table.high is not None:
        inside = (z >= table.low[slots]) & (z <= table.high[slots])
        edited = torch.where(inside, edited, z)
    return edited


def gate_of(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return each token's gate, `sigmoid(weight . z + bias)`.

    Args:
        z: (n, d) float32.
        weight: (n, d) or (1, d) float32.
        bias: (n,) or (1,) float32.

    Returns:
        (n, 1) float32.
    """
    return torch.sigmoid((z * weight).sum(-1, keepdim=True) + bias[:, None])


def edit_stacks(
    activations: Tensor, slots: Tensor, strength: Tensor, table: MapTable, doses: Tensor | None
) -> Tensor:
    """Edit n tokens, each by the maps of its stack, in stack order.

    Args:
        activations: (n, d), any floating dtype.
        slots: (depth, n) int64, for each edit of the stacks each token's slot in the bank.
        strength: (depth, n) float32.
        table: the site's maps.
        doses: (2, depth, n) float32, updated in place where it is given: `doses[0]` adds up each
            edit's dose (see `relative_change`), `doses[1]` counts the edits that acted.

    Returns:
        (n, d) of the activations' dtype; the whole stack is computed in float32 and cast once.
    """
    z = activations.float()
    for index in range(len(slots)):
        edited = edit_tokens(z, slots[index], strength[index], table)
        if doses is not None:
            acts = table.flags[slots[index]] != 0
            doses[0, index] += torch.where(acts, relative_change(z, edited), 0)
            doses[1, index] += acts
        z = edited
    return z.to(activations.dtype)
