"""Builds batches of tokens edited by stacks of affine maps, and their expected results.

A map is an affine edit of a token's activations, scaled by a strength. It may have a support
(bounds outside of which a coordinate is left alone) and a gate (a factor that depends on the
token). Maps are stacked in a table by slot. A dose is the size of an edit, ‖edit‖ / ‖activation‖.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from steering.affine import AffineMap, Gate, MapTable
from steering.site_maps import SiteMaps
from tests import oracles

PATTERNS: Final = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
# Bit patterns of several NaNs, of infinity and of -0.0.
ODD_BITS: Final = {
    torch.float32: (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000 + 5, 0x7F800000, -(2**31)),
    torch.float16: (0x7E00, 0x7C01, 0x7FFF, -0x200 + 5, 0x7C00, -(2**15)),
    torch.bfloat16: (0x7FC0, 0x7F81, 0x7FFF, -0x40 + 5, 0x7F80, -(2**15)),
}


class Sort(NamedTuple):
    """Says whether a map has a support and whether it has a gate."""

    support: bool
    gate: bool


PLAIN: Final = Sort(support=False, gate=False)
SUPPORTED: Final = Sort(support=True, gate=False)
GATED: Final = Sort(support=False, gate=True)
BOTH: Final = Sort(support=True, gate=True)
SORTS: Final = (PLAIN, SUPPORTED, GATED, BOTH)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arguments of an affine edit of n tokens at one site, without the dose accumulator."""

    activations: Tensor  # (n, d)
    slots: Tensor  # (depth, n) int64, the maps that edit each token, one after another
    strength: Tensor  # (depth, n) float32
    table: MapTable

    def tokens(self, which: slice) -> "Batch":
        """Return the batch of the tokens in a slice."""
        return Batch(
            self.activations[which], self.slots[:, which], self.strength[:, which], self.table
        )

    def new_doses(self) -> Tensor:
        """Return a dose accumulator of zeros, (2, depth, n) float32: sums and counts."""
        return torch.zeros(2, *self.slots.shape, device=self.slots.device)


def random_map(width: int, sort: Sort, random: torch.Generator) -> AffineMap:
    """Return a random map with large changes; a support, if any, excludes many coordinates."""
    weight, bias, low, high, gate = torch.randn(5, width, generator=random)
    return AffineMap(
        1 + weight / 2,
        bias / 2,
        low=low - 1 if sort.support else None,
        high=low - 1 + 2 * high.abs() if sort.support else None,
        gate=Gate(2 * gate / width**0.5, gate.sum() / width**0.5) if sort.gate else None,
    )


def random_maps(width: int, sorts: Sequence[Sort] = SORTS, seed: int = 0) -> dict[int, AffineMap]:
    """Return a random map for each sort, by slot, from slot 1 on."""
    random = torch.Generator().manual_seed(seed)
    return {slot: random_map(width, sort, random) for slot, sort in enumerate(sorts, start=1)}


def table_of(maps: Mapping[int, AffineMap], device: torch.device) -> MapTable:
    """Return the table that an edit reads: slot 0 and the slot after the last map are empty."""
    width = next(iter(maps.values())).weight.numel()
    site = SiteMaps(max(maps) + 2, width, device)
    for slot, each in maps.items():
        site.put(slot, each)
    return site.table


def random_batch(
    table: MapTable,
    tokens: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Return random tokens, each with a uniformly drawn stack of slots; strengths from -1 to 2."""
    random = torch.Generator().manual_seed(seed)
    count, width = table.delta.shape
    device = table.delta.device
    activations = 2 * torch.randn(tokens, width, generator=random)
    return Batch(
        activations.to(device, dtype),
        torch.randint(count, (depth, tokens), generator=random).to(device),
        (3 * torch.rand(depth, tokens, generator=random) - 1).to(device),
        table,
    )


def odd_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a (rows, width) tensor of NaNs, infinities and -0.0, whose bits arithmetic changes."""
    bits = torch.tensor(ODD_BITS[dtype], dtype=PATTERNS[dtype])
    return bits.repeat(rows * width)[: rows * width].view(rows, width).to(device).view(dtype)


def by_oracle(batch: Batch, maps: Mapping[int, AffineMap]) -> tuple[Tensor, Tensor]:
    """Return the edited activations and the doses, computed token by token on the CPU."""
    rows = batch.activations.float().cpu().clone()
    doses = torch.zeros(2, *batch.slots.shape)
    for token in range(len(rows)):
        z = rows[token]
        for place in range(len(batch.slots)):
            site_map = maps.get(int(batch.slots[place, token]))
            if site_map is None:
                continue
            strength = float(batch.strength[place, token])
            [edited] = oracles.affine_rows(z[None], site_map, strength)
            doses[0, place, token] = oracles.dose(z, edited)
            doses[1, place, token] = 1
            z = edited
        rows[token] = z
    return rows.to(batch.activations.dtype), doses


def bits_of(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as integers, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().view(PATTERNS[tensor.dtype])
