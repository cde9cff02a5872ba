"""The bank: the loaded interventions' parameters, stacked by slot on the device.

Slot 0 is the identity. Its tokens are kept by selection, not by computing an edit of zero:
arithmetic would turn -0.0 into +0.0 and inf into NaN.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steering.affine import AffineParameters, MapTable
from steering.dose import DoseMeter
from steering.grouped_refinement import GroupedRefinement
from steering.kernels.affine_edit import affine_edit
from steering.reward import RewardHead, refine
from steering.route import AffineRoute, RewardStage, Route
from steering.site_maps import MapPart, SiteMaps, parts_in, parts_of


class SitePart(NamedTuple):
    """A site, and a part of a map there (its map, support or gate)."""

    site: str
    part: MapPart


class Bank:
    """Holds the parameters of up to `slots` interventions; slot 0 is the identity.

    A model may be spread over several devices. A site's maps, or a head, move to the device of the
    activations that they edit when they first edit them.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots = slots
        self._device = device
        self._sites: dict[str, SiteMaps] = {}
        self._heads: dict[int, RewardHead] = {}
        self._parts: dict[int, frozenset[SitePart]] = {}  # slot -> the parts of its maps
        self.slot_changes = 0  # the number of changes of slots' contents
        self.grouped: GroupedRefinement | None = None  # refines rows on a GPU; None: torch does

    # Edits run in inference mode: a table that one has moved to another device is an inference
    # tensor, which torch lets only inference mode change in place.
    @torch.inference_mode()
    def put(self, slot: int, parameters: AffineParameters | RewardHead) -> None:
        """Fill a slot, replacing what it held."""
        if not 1 <= slot <= self.slots:
            raise IndexError(f"slot {slot} is outside 1..{self.slots}")
        self.clear(slot)
        if isinstance(parameters, Mapping):
            for site, site_map in parameters.items():
                self._site(site, site_map.weight.numel()).put(slot, site_map)
            self._parts[slot] = frozenset(
                SitePart(site, part)
                for site, site_map in parameters.items()
                for part in parts_of(site_map)
            )
        else:
            self._heads[slot] = head = self.prepare(parameters, self._device)
            if self.grouped is not None:
                self.grouped.put(slot, head.prepared)
        self.slot_changes += 1

    @torch.inference_mode()
    def allocate_sites(self, widths: Mapping[str, int], *, all_parts: bool = False) -> None:
        """Allocate the memory for maps at some sites (site -> width), ahead of `put`.

        With `all_parts`, memory for supports and gates is allocated too. The sites' tensors are
        then the same ones for as long as the bank lives, as a compiled model needs them.
        """
        for site, width in widths.items():
            maps = self._site(site, width)
            if all_parts:
                maps.allocate_all_parts()

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if self._heads.pop(slot, None) is not None and self.grouped is not None:
            self.grouped.put(slot, None)
        self._parts.pop(slot, None)
        for stack in self._sites.values():
            stack.clear(slot)
        self.slot_changes += 1

    def _site(self, site: str, width: int) -> SiteMaps:
        if site not in self._sites:
            self._sites[site] = SiteMaps(self.slots + 1, width, self._device)
        return self._sites[site]

    @property
    def allocated_parts(self) -> frozenset[SitePart]:
        """The sites and parts that an edit can apply if it reads all of the bank's tensors.

        Filling a slot changes only the tensors' contents, unless it adds a site, or the first
        support or the first gate at a site.
        """
        return frozenset(
            SitePart(site, part)
            for site, maps in self._sites.items()
            for part in parts_in(maps.table)
        )

    def parts_used(self, slots: Iterable[int]) -> frozenset[SitePart]:
        """Return the sites and parts of the maps in some slots."""
        return frozenset[SitePart]().union(*{self._parts[each] for each in slots})

    def table(self, site: str) -> MapTable:
        """Return all maps at a site that memory was allocated for."""
        return self._sites[site].table

    def flags_at(self, sites: Iterable[str], slots: frozenset[int]) -> list[int]:
        """Return for each site what `SiteMaps.flags_of` says of the slots' maps there."""
        return [self._sites[site].flags_of(slots) for site in sites]

    def affine_slot(self) -> int | None:
        """Return a slot that holds affine maps, or None if there is none."""
        return next(iter(self._parts), None)

    def tables_for(self, route: AffineRoute) -> dict[str, MapTable]:
        """Return site -> its maps, for each site at which one of the route's slots has a map.

        A route whose `used_slots` is None gets every site.
        """
        tables = ((site, maps.table_for(route.used_slots)) for site, maps in self._sites.items())
        return {site: table for site, table in tables if table is not None}

    def edit_site(
        self, site: str, activations: Tensor, route: Route, meter: DoseMeter | None = None
    ) -> Tensor:
        """Apply the step's affine edits at one site.

        Args:
            activations: (..., d), any floating dtype; the leading dimensions hold the route's
                tokens in order.
            route: the step's route.
            meter: adds up the edits' doses, if given.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        maps = self._sites.get(site)
        affine = route.on(activations.device).affine
        if maps is None or affine is None:
            return activations
        maps.move(activations.device)
        if (table := maps.table_for(affine.used_slots)) is None:
            return activations
        edited = affine_edit(
            activations.reshape(-1, activations.shape[-1]),
            affine.slots,
            affine.strength,
            table,
            None if meter is None else meter.affine_doses(affine.indices, activations.device),
        )
        return edited.view_as(activations)

    def prepare(self, head: RewardHead, device: torch.device) -> RewardHead:
        """Return a head in the form that `put` keeps on a device. Any thread may call this."""
        head = head.to(device)
        return head.prepare() if self.grouped is not None or device.type == "cpu" else head

    def _head(self, slot: int, device: torch.device) -> RewardHead:
        head = self._heads[slot]
        if head.w1.device != device:
            head = self._heads[slot] = self.prepare(head, device)
        return head

    def edit_rows(self, hidden: Tensor, route: Route, meter: DoseMeter | None = None) -> Tensor:
        """Apply the step's reward edits before `lm_head`.

        Args:
            hidden: (..., d), any floating dtype; its leading dimensions hold the logits rows.
            route: the step's route.
            meter: adds up the edits' doses, if given.

        Returns:
            The same shape and dtype; the whole stack is computed in float32 and cast back once.
        """
        h = hidden.reshape(-1, hidden.shape[-1]).float()
        for stage in route.on(hidden.device).reward:
            rows = h[stage.rows]
            edited = self._refine(rows, stage)
            if meter is not None:
                meter.add_reward_doses(stage.index, rows, edited, stage.rows)
            h = h.index_copy(0, stage.rows, edited)
        return h.to(hidden.dtype).view_as(hidden)

    def _refine(self, rows: Tensor, stage: RewardStage) -> Tensor:
        """Refine a stage's rows, each by its own head: (n, d) float32 -> (n, d) float32."""
        if self.grouped is not None and self.grouped.has_heads(each.slot for each in stage.heads):
            return self.grouped(
                rows,
                [(each.slot, each.row_count) for each in stage.heads],
                stage.slots,
                stage.tile_sizes,
                stage.direction_scale,
                stage.step_sizes,
            )
        refined = []
        first = 0
        for slot, count, iterations in stage.heads:
            own = slice(first, first + count)
            first = own.stop
            scales, sizes = stage.direction_scale[own], stage.step_sizes[own, :iterations]
            refined.append(refine(rows[own], self._head(slot, rows.device), scales, sizes))
        return torch.cat(refined)
