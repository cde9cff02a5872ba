"""The edits at one site as a module, all of whose parameters are tensors.

A compiler can fuse it into what computes the site's output, and one compiled module serves every
layer and every step: parameters, slots and strengths are inputs.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from steering.affine import edit_tokens
from steering.bank import SiteMaps
from steering.dose import relative_change
from steering.route import Route

CHILD: Final = "steering"  # what it is called in the site's module


class SiteEdit(nn.Module):
    """Edits what a site gives, once for each of the `depth` places of the stacks.

    Its tensors are handed to it with each call, by `torch.func.functional_call`.
    """

    slots: Tensor
    strength: Tensor
    doses: Tensor
    present: Tensor
    delta: Tensor
    bias: Tensor
    low: Tensor | None
    high: Tensor | None

    def __init__(self, depth: int, has_support: bool) -> None:
        super().__init__()
        self._depth = depth
        for name in ("slots", "strength", "doses", "present", "delta", "bias"):
            self.register_buffer(name, torch.empty(0))
        for name in ("low", "high"):
            self.register_buffer(name, torch.empty(0) if has_support else None)

    @classmethod
    def install(cls, site: nn.Module, depth: int, has_support: bool) -> None:
        """Have a module's output edited. It becomes a child of the module."""
        edit = cls(depth, has_support)
        site.add_module(CHILD, edit)
        site.register_forward_hook(lambda _site, _args, output: edit(output))

    def forward(self, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """The output, edited; what the edits did to each token is added to `doses`."""
        activations = output[0] if isinstance(output, tuple) else output
        z = activations.reshape(-1, activations.shape[-1]).float()
        for place in range(self._depth):
            slots = self.slots[place]
            edited = edit_tokens(
                z,
                slots,
                self.strength[place],
                present=self.present,
                delta=self.delta,
                bias=self.bias,
                low=self.low,
                high=self.high,
            )
            acts = self.present[slots][:, 0]
            self.doses[0, place] += torch.where(acts, relative_change(z, edited), 0)
            self.doses[1, place] += acts
            z = edited
        edited_output = z.to(activations.dtype).view_as(activations)
        return (edited_output, *output[1:]) if isinstance(output, tuple) else edited_output


def site_tensors(maps: SiteMaps) -> dict[str, Tensor]:
    """What a `SiteEdit` takes of a site's maps."""
    tensors = {"present": maps.present, "delta": maps.delta, "bias": maps.bias}
    if maps.low is not None and maps.high is not None:
        tensors |= {"low": maps.low, "high": maps.high}
    return tensors


def step_tensors(route: Route, tokens: int) -> Mapping[str, Tensor]:
    """What every `SiteEdit` takes of a step.

    Returns:
        slots: (depth, tokens) int64; strength: (depth, tokens, 1) float32; doses: zeros,
        (2, depth, tokens) float32, for the doses added up and for how many they are.
    """
    return {
        "slots": torch.stack([layer.slots for layer in route.affine]),
        "strength": torch.stack([layer.strength for layer in route.affine]),
        "doses": torch.zeros(2, len(route.affine), tokens, device=route.device),
    }
