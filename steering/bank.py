"""The bank: the loaded interventions' parameters, stacked by slot on the device.

Slot 0 is the identity. It is selected away and never computed: arithmetic would turn -0.0 into
+0.0 and inf into NaN.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steering.affine import AffineMap, AffineParameters, edit_tokens
from steering.dose import DoseMeter
from steering.native import NativeRefinement
from steering.refine import Headed, refine
from steering.reward import RewardHead
from steering.route import AffineLayer, Route


class MapNeed(NamedTuple):
    """A site at which a map acts, and whether it acts on a support only."""

    site: str
    support: bool


class SiteMaps:
    """All slots' maps at one site of width d."""

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        self.delta = torch.zeros(slots, width, device=device)  # weight - 1
        self.bias = torch.zeros(slots, width, device=device)
        self.present = torch.zeros(slots, 1, dtype=torch.bool, device=device)
        self.filled: set[int] = set()  # `present`, as the host knows it
        self.low: Tensor | None = None  # (slots, d), made with the first map that has a support
        self.high: Tensor | None = None

    def put(self, slot: int, site_map: AffineMap) -> None:
        self.delta[slot] = site_map.weight - 1
        self.bias[slot] = site_map.bias
        self.present[slot] = True
        self.filled.add(slot)
        if site_map.low is not None and site_map.high is not None:
            if self.low is None or self.high is None:
                # Both or none, also where memory is short.
                low = torch.full_like(self.delta, -torch.inf)
                self.low, self.high = low, torch.full_like(self.delta, torch.inf)
            self.low[slot] = site_map.low
            self.high[slot] = site_map.high

    def clear(self, slot: int) -> None:
        self.present[slot] = False
        self.filled.discard(slot)
        if self.low is not None and self.high is not None:
            self.low[slot] = -torch.inf
            self.high[slot] = torch.inf

    def move(self, device: torch.device) -> None:
        """Bring the parameters to where the site's activations are."""
        if self.delta.device == device:
            return
        self.delta, self.bias = self.delta.to(device), self.bias.to(device)
        self.present = self.present.to(device)
        if self.low is not None and self.high is not None:
            self.low, self.high = self.low.to(device), self.high.to(device)

    def edit(self, z: Tensor, layer: AffineLayer) -> Tensor:
        """(tokens, d) float32 -> (tokens, d) float32."""
        return edit_tokens(
            z,
            layer.slots,
            layer.strength,
            present=self.present,
            delta=self.delta,
            bias=self.bias,
            low=self.low,
            high=self.high,
        )

    def used_by(self, layer: AffineLayer) -> bool:
        """Whether any token of a step may have a map here, as the host knows."""
        return layer.everywhere or bool(self.filled & layer.used)

    def acts(self, layer: AffineLayer) -> Tensor:
        """Which of the tokens have a map here: (tokens,) bool."""
        return self.present[layer.slots][:, 0]


class Bank:
    """Parameters of up to `slots` interventions besides the identity in slot 0.

    A site's parameters, and a head, are moved to the device of what they edit when they first
    edit it: a model may be spread over several.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots = slots
        self._device = device
        self._sites: dict[str, SiteMaps] = {}
        self._heads: dict[int, RewardHead] = {}
        self._needs: dict[int, frozenset[MapNeed]] = {}  # by slot, of affine interventions
        self.fillings = 0  # counts every change of what a slot holds
        self.native: NativeRefinement | None = None  # refines rows on a CPU, where one was made

    # Whatever mode the caller is in: what an edit has moved may only be changed in this one.
    @torch.inference_mode()
    def put(self, slot: int, parameters: AffineParameters | RewardHead) -> None:
        """Fill a slot, replacing what it held."""
        if not 1 <= slot <= self.slots:
            raise IndexError(f"slot {slot} is outside 1..{self.slots}")
        self.clear(slot)
        if isinstance(parameters, Mapping):
            for site, site_map in parameters.items():
                self._site(site, site_map.weight.numel()).put(slot, site_map)
            self._needs[slot] = frozenset(
                MapNeed(site, site_map.low is not None) for site, site_map in parameters.items()
            )
        else:
            self._heads[slot] = self.ready(parameters, self._device)
        self.fillings += 1

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._heads.pop(slot, None)
        self._needs.pop(slot, None)
        for stack in self._sites.values():
            stack.clear(slot)
        self.fillings += 1

    def _site(self, site: str, width: int) -> SiteMaps:
        if site not in self._sites:
            self._sites[site] = SiteMaps(self.slots + 1, width, self._device)
        return self._sites[site]

    @property
    def layout(self) -> frozenset[MapNeed]:
        """What an edit that reads all of the bank's tensors can do.

        To fill a slot changes the tensors' contents only, unless it brings a site, or the first
        support at one.
        """
        return frozenset(
            MapNeed(site, support)
            for site, maps in self._sites.items()
            for support in ((False, True) if maps.low is not None else (False,))
        )

    def needs(self, slots: Iterable[int]) -> frozenset[MapNeed]:
        """What the maps in some slots do."""
        return frozenset[MapNeed]().union(*{self._needs[each] for each in slots})

    def affine_slot(self) -> int | None:
        """A slot that holds affine maps; None if none does."""
        return next(iter(self._needs), None)

    def acting(self, route: Route) -> dict[str, SiteMaps]:
        """The maps of each site at which the step's affine edits do anything."""
        used = route.used_slots
        return {site: maps for site, maps in self._sites.items() if maps.filled & used}

    def edit_site(
        self, site: str, output: Tensor, route: Route, meter: DoseMeter | None = None
    ) -> Tensor:
        """Apply the step's affine edits at one site.

        Args:
            output: (..., d), the site's output, any floating dtype; its leading dimensions hold
                the route's tokens in order.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        maps = self._sites.get(site)
        if maps is None or not any(maps.used_by(layer) for layer in route.affine):
            return output
        maps.move(output.device)
        z = output.reshape(-1, output.shape[-1]).float()
        for layer in route.on(output.device).affine:
            if maps.used_by(layer):
                edited = maps.edit(z, layer)
                if meter is not None:
                    meter.affine(layer.depth, z, edited, maps.acts(layer))
                z = edited
        return z.to(output.dtype).view_as(output)

    def ready(self, head: RewardHead, device: torch.device) -> RewardHead:
        """A head as it is used on a device. May be called on any thread, ahead of `put`."""
        head = head.to(device)
        return head if self.native is None or device.type != "cpu" else head.prepare()

    def _head(self, slot: int, device: torch.device) -> RewardHead:
        head = self._heads[slot]
        if head.w1.device != device:
            head = self._heads[slot] = self.ready(head, device)
        return head

    def edit_rows(self, hidden: Tensor, route: Route, meter: DoseMeter | None = None) -> Tensor:
        """Apply the step's reward edits before `lm_head`.

        Args:
            hidden: (..., d), any floating dtype; its leading dimensions hold the logits rows.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        h = hidden.reshape(-1, hidden.shape[-1]).float()
        for layer in route.on(hidden.device).reward:
            rows = h[layer.rows]
            edited = refine(
                rows,
                [
                    Headed(self._head(each.slot, hidden.device), each.rows, each.most_iterations)
                    for each in layer.heads
                ],
                layer.direction_scale,
                layer.step_sizes,
                self.native,
            )
            if meter is not None:
                meter.reward(layer.depth, rows, edited, layer.rows)
            h = h.index_copy(0, layer.rows, edited)
        return h.to(hidden.dtype).view_as(hidden)
