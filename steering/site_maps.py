"""All loaded maps at one site, stacked by slot on the site's device."""

from enum import Enum
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from steering.affine import ALL_MAPPED, HAS_GATE, HAS_MAP, HAS_SUPPORT, AffineMap, MapTable


class MapPart(Enum):
    """A part that a map may have."""

    MAP = "map"
    SUPPORT = "support"
    GATE = "gate"


def parts_of(site_map: AffineMap) -> frozenset[MapPart]:
    """Return the parts of a map."""
    parts = {MapPart.MAP}
    if site_map.low is not None:
        parts.add(MapPart.SUPPORT)
    if site_map.gate is not None:
        parts.add(MapPart.GATE)
    return frozenset(parts)


def parts_in(table: MapTable) -> frozenset[MapPart]:
    """Return the parts for which a table has tensors."""
    tensors = {
        MapPart.MAP: table.flags,
        MapPart.SUPPORT: table.low,
        MapPart.GATE: table.gate_weight,
    }
    return frozenset(part for part, tensor in tensors.items() if tensor is not None)


def reduced(table: MapTable, flags: int) -> MapTable:
    """Return a table without the tensors that maps with these flags do not read."""
    has_flags, delta, bias, low, high, gate_weight, gate_bias = table
    if not flags & HAS_SUPPORT:
        low = high = None
    if not flags & HAS_GATE:
        gate_weight = gate_bias = None
    return MapTable(has_flags, delta, bias, low, high, gate_weight, gate_bias)


class SiteMaps:
    """The maps of up to `slots` slots at one site of width d.

    Few maps have a support or a gate. Memory for supports, and for gates, is allocated when the
    first map that has one is put.
    """

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        self.table = MapTable(
            flags=torch.zeros(slots, dtype=torch.int32, device=device),
            delta=torch.zeros(slots, width, device=device),
            bias=torch.zeros(slots, width, device=device),
            low=None,
            high=None,
            gate_weight=None,
            gate_bias=None,
        )
        # Slot -> the flags of its map, kept on the host so that no one has to read `table.flags`.
        self._flags: dict[int, int] = {}

    def put(self, slot: int, site_map: AffineMap) -> None:
        """Fill an empty slot."""
        flags = HAS_MAP
        if site_map.low is not None and site_map.high is not None:
            flags |= HAS_SUPPORT
            low, high = self._supports()
            low[slot], high[slot] = site_map.low, site_map.high
        if (gate := site_map.gate) is not None:
            flags |= HAS_GATE
            weights, biases = self._gates()
            weights[slot], biases[slot] = gate.weight, gate.bias
        self.table.delta[slot] = site_map.weight - 1
        self.table.bias[slot] = site_map.bias
        self.table.flags[slot] = flags
        self._flags[slot] = flags

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.table.flags[slot] = 0
        self._flags.pop(slot, None)
        if self.table.low is not None and self.table.high is not None:
            self.table.low[slot] = -torch.inf
            self.table.high[slot] = torch.inf
        if self.table.gate_weight is not None and self.table.gate_bias is not None:
            self.table.gate_weight[slot] = 0
            self.table.gate_bias[slot] = 0

    def allocate_all_parts(self) -> None:
        """Allocate the memory for supports and gates, so that `put` replaces no tensor."""
        self._supports()
        self._gates()

    def move(self, device: torch.device) -> None:
        """Move the maps to a device, that of the site's activations."""
        if self.table.flags.device != device:
            self.table = self.table.to(device)

    def table_for(self, used: frozenset[int] | None) -> MapTable | None:
        """Return the tensors that an edit by some slots' maps reads; None if none has a map here.

        Args:
            used: the slots; None for all slots, whatever they hold now or later.
        """
        if used is None:
            return self.table
        flags = self.flags_of(used)
        return reduced(self.table, flags) if flags & HAS_MAP else None

    def flags_of(self, slots: frozenset[int]) -> int:
        """Return the bits that the flags of any of the slots have, and perhaps `ALL_MAPPED`."""
        flags = [self._flags.get(slot, 0) for slot in slots]
        return reduce(or_, flags, ALL_MAPPED if all(flags) else 0)

    def _supports(self) -> tuple[Tensor, Tensor]:
        table = self.table
        if table.low is None or table.high is None:
            # Allocate both before assigning either, in case memory runs out.
            low = torch.full_like(table.delta, -torch.inf)
            high = torch.full_like(table.delta, torch.inf)
            self.table = table._replace(low=low, high=high)
            return low, high
        return table.low, table.high

    def _gates(self) -> tuple[Tensor, Tensor]:
        table = self.table
        if table.gate_weight is None or table.gate_bias is None:
            weights = torch.zeros_like(table.delta)
            biases = torch.zeros(len(table.flags), device=weights.device)
            self.table = table._replace(gate_weight=weights, gate_bias=biases)
            return weights, biases
        return table.gate_weight, table.gate_bias
