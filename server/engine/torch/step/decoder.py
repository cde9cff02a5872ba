"""Groups a model's decoder layers by structure, and lets other code compute them for a while."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.torch.attention.backend import AttentionStep
from steering.sites import SiteLocation, locate_site

LayerCall: TypeAlias = Callable[..., object]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """The layers' inputs and outputs in a forward pass, to compile and check graphs with."""

    tokens: int
    attention: AttentionStep
    inputs: list[tuple[tuple[object, ...], dict[str, object]]]  # by layer
    outputs: list[object]  # by layer


class DecoderLayers:
    """A model's layers, any of which other functions can compute within a context."""

    def __init__(self, model: PreTrainedModel) -> None:
        path, self.modules = _find(model)
        self._prefix = f"{path}."
        self.tensors = [_tensors(module) for module in self.modules]
        # Each layer's index as a tensor, for graphs that several layers share.
        self.index_tensors = [torch.tensor(index) for index in range(len(self.modules))]
        # Layers of one structure differ in nothing but their tensors.
        self.structures: list[nn.Module] = []  # a template of each structure
        self.structure_of: list[int] = []  # by layer, its structure's index
        signatures: list[object] = []
        for module in self.modules:
            if (signature := _signature(module)) not in signatures:
                signatures.append(signature)
                self.structures.append(template_of(module))
            self.structure_of.append(signatures.index(signature))
        self._originals: list[LayerCall] = [module.forward for module in self.modules]
        self._calls: Sequence[LayerCall | None] = [None] * len(self.modules)
        for index, module in enumerate(self.modules):
            module.forward = self._dispatch(index)

    def locate(self, site: str) -> tuple[int, SiteLocation] | None:
        """Return the layer that computes a site, and the site's location in it; None if none does.

        None for a layer's own input and output, too, which are edited outside of its `forward`.
        """
        module, is_input = locate_site(site)
        if not module.startswith(self._prefix):
            return None
        index, _, inside = module.removeprefix(self._prefix).partition(".")
        return (int(index), SiteLocation(inside, is_input)) if inside else None

    @contextmanager
    def replaced_by(self, calls: Sequence[LayerCall | None]) -> Iterator[None]:
        """Have `calls` compute the layers within the context; None leaves a layer as it is."""
        before, self._calls = self._calls, calls
        try:
            yield
        finally:
            self._calls = before

    @contextmanager
    def recording(self, tokens: int, attention: AttentionStep) -> Iterator[RecordedStep]:
        """Record the forward pass, of `tokens` tokens, that is run within the context."""
        recorded = RecordedStep(tokens, attention, [], [])

        def recorder(compute: LayerCall) -> LayerCall:
            def call(*args: object, **kwargs: object) -> object:
                output = compute(*args, **kwargs)
                recorded.inputs.append((args, kwargs))
                recorded.outputs.append(output)
                return output

            return call

        with self.replaced_by([recorder(compute) for compute in self._originals]):
            yield recorded

    def _dispatch(self, index: int) -> LayerCall:
        def forward(*args: object, **kwargs: object) -> object:
            return (self._calls[index] or self._originals[index])(*args, **kwargs)

        return forward


def _find(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Find the list of a model's layers; return its path and the layers."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _signature(layer: nn.Module) -> object:
    """Return a value that is equal for layers that differ only in index and tensors' values."""
    parts = [
        (path, type(module), sorted(_constants(module).items()))
        for path, module in layer.named_modules()
    ]
    shapes = [(name, each.shape, each.dtype) for name, each in _tensors(layer).items()]
    return parts, shapes


def _constants(module: nn.Module) -> Mapping[str, str]:
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name != "layer_idx"
    }


def template_of(layer: nn.Module) -> nn.Module:
    """Copy a layer without its hooks and tensors; its tensors are to be given with each call."""
    memo: dict[int, object] = {id(each): torch.empty(0) for each in layer.buffers()}
    memo |= {
        id(each): nn.Parameter(torch.empty(0), requires_grad=False) for each in layer.parameters()
    }
    template = copy.deepcopy(layer, memo)
    for module in template.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return template
