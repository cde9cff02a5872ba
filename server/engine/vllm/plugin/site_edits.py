"""The edits as modules inside a model: they read the step's route from tensors that stay."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from server.engine.vllm.plugin.wire import MOST_EDITS
from steering.affine import MapTable
from steering.hooks import edit_activations
from steering.kernels.routed_edit import StepTensors, routed_edit
from steering.route import AffineRoute
from steering.sites import SiteLocation

_CHILD: Final = "steering"  # the name of a site's edit among its module's children


class StepBuffers(nn.Module):
    """A step's route and what is measured of it, in the tensors of `StepTensors`.

    Compiled models and CUDA graphs read these tensors, so a step only overwrites their contents.
    """

    def __init__(self, tokens: int, sites: int, device: torch.device) -> None:
        """Allocate the tensors.

        Args:
            tokens: the largest number of tokens in a step, padding included.
            sites: the number of sites.
            device: the model's.
        """
        super().__init__()
        # One more: a compiler that traces a step with as many tokens as there are columns would
        # take the number of tokens for a constant.
        columns = tokens + 1
        stacks = (MOST_EDITS, columns)
        for name, tensor in (
            StepTensors(
                extent=torch.zeros(4, dtype=torch.int64, device=device),
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
        self.used_flags = torch.zeros(sites, dtype=torch.int32, device=device)

    @property
    def step(self) -> StepTensors:
        """The tensors."""
        return StepTensors(*(getattr(self, name) for name in StepTensors._fields))

    def fill(self, affine: AffineRoute | None, *, is_measured: bool = False) -> None:
        """Write a step's route; tokens beyond it, padding too, are not edited.

        On a CPU, only the tokens that are edited get a column.
        """
        step = self.step
        if affine is None:
            step.extent.zero_()
            return
        slots, strength = affine.slots, affine.strength
        has_edit = slots != 0
        if not step.slots.is_cuda:
            [rows] = has_edit.any(dim=0).nonzero(as_tuple=True)
            if len(rows) < slots.shape[1]:
                slots, strength, has_edit = (
                    each.index_select(1, rows) for each in (slots, strength, has_edit)
                )
            _write(rows, step.rows[: len(rows)])
        depth, columns = slots.shape
        extent = [depth, columns, bool(has_edit.all()), is_measured]
        _write(torch.tensor(extent, dtype=torch.int64), step.extent)
        _write(slots, step.slots[:depth, :columns])
        _write(strength, step.strength[:depth, :columns])
        if is_measured:
            step.doses.zero_()
            step.seconds.zero_()

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
        """Edit (tokens, d) activations in place, and return them."""
        table = MapTable(*(getattr(self, name) for name in MapTable._fields))
        routed_edit(activations, self.buffers_of_step.step, self.used_flags, table)
        return activations


def _write(values: Tensor, target: Tensor) -> None:
    """Copy values from the host to a part of a buffer, without waiting for its device.

    The copy reads pinned memory of its own, so that no step overwrites what the copy of the step
    before still reads.
    """
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
