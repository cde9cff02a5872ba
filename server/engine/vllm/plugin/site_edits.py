"""The edits as modules inside a model: they read the step's route from tensors that stay."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from server.engine.vllm.plugin.wire import MOST_EDITS
from steering.affine import HAS_MAP, MapTable, edit_stacks
from steering.hooks import edit_activations
from steering.kernels.routed_edit import StepTensors, routed_edit
from steering.route import AffineRoute
from steering.site_maps import reduced
from steering.sites import SiteLocation

_CHILD: Final = "steering"  # the name of a site's edit among its module's children


class StepBuffers(nn.Module):
    """A step's route and what is measured of it, in the tensors of `StepTensors`.

    Compiled models and CUDA graphs read these tensors, so a step only overwrites their contents.

    On a CPU the operator `routed_edit` runs Python between the layers, when the weights have just
    driven it out of the caches: 150 to 400 us a site. There a compiled model edits simple tokens by
    itself, and the operator edits the others. A token is simple if it has one edit, by maps without
    supports and gates.
    """

    simple_slots: Tensor  # (columns,) int64, of simple tokens that a compiled model edits, or 0
    simple_strength: Tensor  # (columns,) float32

    def __init__(self, tokens: int, sites: int, device: torch.device, *, inlines: bool) -> None:
        """Allocate the tensors.

        Args:
            tokens: the largest number of tokens in a step, padding included.
            sites: the number of sites.
            device: the model's.
            inlines: True if the edits of simple tokens are part of the compiled model.
        """
        super().__init__()
        self.inlines: Final = inlines
        # One more: a compiler that traces a step with as many tokens as there are columns would
        # take the number of tokens for a constant.
        columns = tokens + 1
        stacks = (MOST_EDITS, columns)
        for name, tensor in (
            StepTensors(
                extent=torch.zeros(5, dtype=torch.int64, device=device),
                rows=torch.zeros(columns, dtype=torch.int64, device=device),
                slots=torch.zeros(stacks, dtype=torch.int64, device=device),
                strength=torch.zeros(stacks, device=device),
                doses=torch.zeros(2, *stacks, device=device),
                seconds=torch.zeros(2, dtype=torch.float64, device=device),
            )
            ._asdict()
            .items()
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("simple_slots", torch.zeros_like(self.step.rows), persistent=False)
        strength = torch.zeros(columns, device=device)
        self.register_buffer("simple_strength", strength, persistent=False)
        self.used_flags = torch.zeros(sites, dtype=torch.int32, device=device)

    @property
    def step(self) -> StepTensors:
        """The tensors."""
        return StepTensors(*(getattr(self, name) for name in StepTensors._fields))

    def fill(
        self, affine: AffineRoute | None, simple: Tensor | None = None, *, is_measured: bool = False
    ) -> None:
        """Write a step's route; tokens beyond it, padding too, are not edited.

        On a CPU, only the tokens that the operator edits or measures get a column.

        Args:
            affine: the route.
            simple: (tokens,) bool, the simple ones; None if the operator edits those too.
            is_measured: True if the operator measures all tokens.
        """
        step = self.step
        if self.inlines:
            self.simple_slots.zero_()
        if affine is None:
            step.extent.zero_()
            return
        slots, strength = affine.slots, affine.strength
        has_edit = slots != 0
        edited = slots.shape[1]
        if not step.slots.is_cuda:
            by_operator = has_edit.any(dim=0)
            if simple is not None:
                self._fill_simple(affine, simple)
                by_operator &= ~simple
            [rows] = by_operator.nonzero(as_tuple=True)
            edited = len(rows)
            if simple is not None and is_measured:
                rows = torch.cat([rows, *simple.nonzero(as_tuple=True)])
            if edited < slots.shape[1]:
                slots, strength, has_edit = (
                    each.index_select(1, rows) for each in (slots, strength, has_edit)
                )
            _write(rows, step.rows[: len(rows)])
        depth, columns = slots.shape
        extent = [depth if columns else 0, columns, bool(has_edit.all()), is_measured, edited]
        _write(torch.tensor(extent, dtype=torch.int64), step.extent)
        _write(slots, step.slots[:depth, :columns])
        _write(strength, step.strength[:depth, :columns])
        if is_measured:
            step.doses.zero_()
            step.seconds.zero_()

    def _fill_simple(self, affine: AffineRoute, simple: Tensor) -> None:
        """Write the edits of the simple tokens. Of a stack with one edit, the sum is that edit."""
        tokens = len(simple)
        slots, strength = affine.slots.sum(dim=0), affine.strength.sum(dim=0)
        self.simple_slots[:tokens] = torch.where(simple, slots, 0)
        self.simple_strength[:tokens] = strength

    def fill_flags(self, used_flags: Sequence[int]) -> None:
        """Write for each site what `SiteMaps.flags_of` says of the slots in use."""
        _write(torch.tensor(used_flags, dtype=torch.int32), self.used_flags)

    def doses_of(self, affine: AffineRoute) -> Tensor:
        """Return the doses of the last step with affine edits: (2, depth, tokens) float32."""
        depth, tokens = affine.slots.shape
        if self.step.slots.is_cuda:
            return self.step.doses[:, :depth, :tokens]
        columns = int((affine.slots != 0).any(dim=0).sum())
        rows, doses = self.step.rows[:columns], self.step.doses[:, :depth, :columns]
        return doses.new_zeros(2, depth, tokens).index_copy_(2, rows, doses)


class SteeredSite(nn.Module):
    """Edits a site's activations by the maps that the step's tokens use there."""

    used_flags: Tensor  # (1,) int32, see `SiteMaps.flags_of`

    def __init__(self, buffers: StepBuffers, used_flags: Tensor, table: MapTable) -> None:
        super().__init__()
        self.buffers_of_step = buffers
        self.register_buffer("used_flags", used_flags, persistent=False)
        for name, tensor in table._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def install(
        cls,
        module: nn.Module,
        location: SiteLocation,
        buffers: StepBuffers,
        index: int,
        table: MapTable,
    ) -> None:
        """Hook an edit to a site, the one of that index among the sites of the buffers."""
        edit = cls(buffers, buffers.used_flags[index : index + 1], table)
        # The edit is the module's child, so that its tensors are the model's own, and a compiler
        # takes them for inputs.
        module.add_module(_CHILD, edit)
        edit_activations(module, location, edit)

    def forward(self, activations: Tensor) -> Tensor:
        """Edit (tokens, d) activations in place, and return them, simple tokens edited too."""
        buffers = self.buffers_of_step
        table = MapTable(*(getattr(self, name) for name in MapTable._fields))
        routed_edit(activations, buffers.step, self.used_flags, table)
        if not buffers.inlines:
            return activations
        tokens = activations.shape[0]
        slots = buffers.simple_slots.narrow(0, 0, tokens)
        strength = buffers.simple_strength.narrow(0, 0, tokens)
        return edit_stacks(activations, slots[None], strength[None], reduced(table, HAS_MAP), None)


def _write(values: Tensor, target: Tensor) -> None:
    """Copy values from the host to a part of a buffer, without waiting for its device.

    The copy reads pinned memory of its own, so that no step overwrites what the copy of the step
    before still reads.
    """
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
