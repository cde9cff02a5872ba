"""The bank: the loaded interventions' parameters, stacked by slot on the device.

Slot 0 is the identity. It is selected away and never computed: arithmetic would turn -0.0 into
+0.0 and inf into NaN.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steering.affine import AffineParameters, MapTable
from steering.dose import DoseMeter
from steering.grouped_refinement import GroupedRefinement
from steering.kernels.affine_edit import affine_edit
from steering.native import NativeRefinement
from steering.refine import HeadGroup, refine
from steering.reward import RewardHead
from steering.route import AffineRoute, RewardStage, Route
from steering.site_maps import Part, SiteMaps, parts_in, parts_of


class MapNeed(NamedTuple):
    """A part of a map that acts at a site."""

    site: str
    part: Part


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
        self.slot_changes = 0  # counts every change of what a slot holds
        self.native: NativeRefinement | None = None  # refines rows on a CPU, where one was made
        self.grouped: GroupedRefinement | None = None  # and on a GPU

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
                MapNeed(site, part)
                for site, site_map in parameters.items()
                for part in parts_of(site_map)
            )
        else:
            self._heads[slot] = head = self.prepare(parameters, self._device)
            if self.grouped is not None:
                self.grouped.put(slot, head.prepared)
        self.slot_changes += 1

    @torch.inference_mode()
    def make_room(self, widths: Mapping[str, int]) -> None:
        """Take the memory for maps at some sites (site -> width), ahead of `put`."""
        for site, width in widths.items():
            self._site(site, width)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if self._heads.pop(slot, None) is not None and self.grouped is not None:
            self.grouped.put(slot, None)
        self._needs.pop(slot, None)
        for stack in self._sites.values():
            stack.clear(slot)
        self.slot_changes += 1

    def _site(self, site: str, width: int) -> SiteMaps:
        if site not in self._sites:
            self._sites[site] = SiteMaps(self.slots + 1, width, self._device)
        return self._sites[site]

    @property
    def layout(self) -> frozenset[MapNeed]:
        """What an edit that reads all of the bank's tensors can do.

        To fill a slot changes the tensors' contents only, unless it brings a site, or the first
        support or gate at one.
        """
        return frozenset(
            MapNeed(site, part)
            for site, maps in self._sites.items()
            for part in parts_in(maps.table)
        )

    def needs(self, slots: Iterable[int]) -> frozenset[MapNeed]:
        """What the maps in some slots do."""
        return frozenset[MapNeed]().union(*{self._needs[each] for each in slots})

    def affine_slot(self) -> int | None:
        """A slot that holds affine maps; None if none does."""
        return next(iter(self._needs), None)

    def acting(self, route: AffineRoute) -> dict[str, MapTable]:
        """Give the maps' parameters at each site at which a step's affine edits do anything."""
        tables = ((site, maps.acting(route.used)) for site, maps in self._sites.items())
        return {site: table for site, table in tables if table is not None}

    def edit_site(
        self, site: str, activations: Tensor, route: Route, meter: DoseMeter | None = None
    ) -> Tensor:
        """Apply the step's affine edits at one site.

        Args:
            activations: (..., d), any floating dtype; the leading dimensions hold the route's
                tokens in order.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        maps = self._sites.get(site)
        affine = route.on(activations.device).affine
        if maps is None or affine is None:
            return activations
        maps.move(activations.device)
        if (table := maps.acting(affine.used)) is None:
            return activations
        edited = affine_edit(
            activations.reshape(-1, activations.shape[-1]),
            affine.slots,
            affine.strength,
            table,
            None if meter is None else meter.affine(affine.places, activations.device),
        )
        return edited.view_as(activations)

    def prepare(self, head: RewardHead, device: torch.device) -> RewardHead:
        """A head as it is used on a device. May be called on any thread, ahead of `put`."""
        head = head.to(device)
        is_prepared = self.grouped is not None or (self.native is not None and device.type == "cpu")
        return head.prepare() if is_prepared else head

    def _head(self, slot: int, device: torch.device) -> RewardHead:
        head = self._heads[slot]
        if head.w1.device != device:
            head = self._heads[slot] = self.prepare(head, device)
        return head

    def edit_rows(self, hidden: Tensor, route: Route, meter: DoseMeter | None = None) -> Tensor:
        """Apply the step's reward edits before `lm_head`.

        Args:
            hidden: (..., d), any floating dtype; its leading dimensions hold the logits rows.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        h = hidden.reshape(-1, hidden.shape[-1]).float()
        for stage in route.on(hidden.device).reward:
            rows = h[stage.rows]
            edited = self._refine(rows, stage)
            if meter is not None:
                meter.reward(stage.depth, rows, edited, stage.rows)
            h = h.index_copy(0, stage.rows, edited)
        return h.to(hidden.dtype).view_as(hidden)

    def _refine(self, rows: Tensor, stage: RewardStage) -> Tensor:
        """Rows, each edited by its own head: (n, d) float32 -> (n, d) float32."""
        if self.grouped is not None and self.grouped.holds(each.slot for each in stage.heads):
            return self.grouped(
                rows,
                [(each.slot, each.rows) for each in stage.heads],
                stage.slots,
                stage.counts,
                stage.direction_scale,
                stage.step_sizes,
            )
        heads = [
            HeadGroup(self._head(each.slot, rows.device), each.rows, each.most_iterations)
            for each in stage.heads
        ]
        return refine(rows, heads, stage.direction_scale, stage.step_sizes, self.native)
