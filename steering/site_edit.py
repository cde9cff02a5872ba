"""The affine edits at one site as a module whose every input is a tensor.

A compiler can fuse the edits into the computation of the site's activations. Maps, slots and
strengths are inputs, so that one compiled module serves all equal layers and all steps.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from steering.affine import MapTable, edit_stacks
from steering.dose import DoseMeter
from steering.hooks import edit_activations
from steering.route import AffineRoute
from steering.site_maps import MapPart
from steering.sites import SiteLocation

# Names of the edit as a child of the module that it edits.
_OUTPUT_CHILD: Final = "steering"
_INPUT_CHILD: Final = "input_steering"
_STEP: Final = ("slots", "strength", "doses")


class SiteEdit(nn.Module):
    """Edits a site's activations, each token by the maps of its stack.

    Its buffers are placeholders: `torch.func.functional_call` replaces them in each call.
    """

    def __init__(self, table_names: Mapping[str, bool]) -> None:
        """`table_names`: field of `MapTable` -> True if it is a tensor, False if it is None."""
        super().__init__()
        for name in _STEP:
            self.register_buffer(name, torch.empty(0))
        for name, is_there in table_names.items():
            self.register_buffer(name, torch.empty(0) if is_there else None)

    @classmethod
    def install(cls, module: nn.Module, location: SiteLocation, parts: frozenset[MapPart]) -> None:
        """Hook an edit by maps of the given parts to a site; it becomes a child of the module."""
        optional = {"low": MapPart.SUPPORT, "high": MapPart.SUPPORT}
        optional |= {"gate_weight": MapPart.GATE, "gate_bias": MapPart.GATE}
        edit = cls({name: optional.get(name, MapPart.MAP) in parts for name in MapTable._fields})
        module.add_module(_child_name(location), edit)
        edit_activations(module, location, edit)

    def forward(self, activations: Tensor) -> Tensor:
        """Return the edited activations, and add the edits' doses to `doses`."""
        table = MapTable(*(getattr(self, name) for name in MapTable._fields))
        rows = activations.reshape(-1, activations.shape[-1])
        slots, strength, doses = (getattr(self, name) for name in _STEP)
        return edit_stacks(rows, slots, strength, table, doses).view_as(activations)


def named_tensors(location: SiteLocation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a site's tensors to the names that its edit has in the model (or layer)."""
    path = f"{location.module}." if location.module else ""
    return {f"{path}{_child_name(location)}.{name}": tensor for name, tensor in tensors.items()}


def site_tensors(table: MapTable) -> dict[str, Tensor]:
    """Return the inputs that a `SiteEdit` takes from a site's maps."""
    return {name: each for name, each in table._asdict().items() if each is not None}


def step_tensors(route: AffineRoute, tokens: int, meter: DoseMeter | None) -> dict[str, Tensor]:
    """Return the inputs that every `SiteEdit` takes from a step. Doses go to the meter, if any."""
    device = route.slots.device
    doses = (
        torch.zeros(2, len(route.indices), tokens, device=device)
        if meter is None
        else meter.affine_doses(route.indices, device)
    )
    return {"slots": route.slots, "strength": route.strength, "doses": doses}


def _child_name(location: SiteLocation) -> str:
    return _INPUT_CHILD if location.is_input else _OUTPUT_CHILD
