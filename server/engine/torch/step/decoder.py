"""A model's decoder layers: which of them are alike, and who computes them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.torch.attention.backend import AttentionStep
from steering.sites import Place, place_of

LayerCall: TypeAlias = Callable[..., object]


@dataclass(slots=True)
class Record:
    """What the layers were given in one forward pass, and what they made of it."""

    tokens: int
    inputs: list[tuple[tuple[object, ...], dict[str, object]]]  # by layer
    outputs: list[object]  # by layer


@dataclass(frozen=True, slots=True)
class Probe:
    """What the layers did in a forward pass, for a graph to be made and checked with."""

    record: Record
    attention: AttentionStep


class DecoderLayers:
    """The layers of a model, each of which somebody else may compute for a while."""

    def __init__(self, model: PreTrainedModel) -> None:
        path, self.modules = _find(model)
        self._prefix = f"{path}."
        self.tensors = [_tensors(module) for module in self.modules]
        # What is read at run time where all layers share one graph.
        self.positions = [torch.tensor(index) for index in range(len(self.modules))]
        # Layers of one structure differ in nothing but their tensors.
        self.structures: list[nn.Module] = []
        self.structure_of: list[int] = []
        signatures: list[object] = []
        for module in self.modules:
            if (signature := _signature(module)) not in signatures:
                signatures.append(signature)
                self.structures.append(template_of(module))
            self.structure_of.append(signatures.index(signature))
        self._own: list[LayerCall] = [module.forward for module in self.modules]
        self._calls: Sequence[LayerCall | None] = [None] * len(self.modules)
        for index, module in enumerate(self.modules):
            module.forward = self._dispatch(index)

    def place(self, site: str) -> tuple[int, Place] | None:
        """The layer that computes a site, and where the site is in it; None where none does.

        What a layer itself gives, or is given, is edited around the layer.
        """
        module, is_input = place_of(site)
        if not module.startswith(self._prefix):
            return None
        index, _, inside = module.removeprefix(self._prefix).partition(".")
        return (int(index), Place(inside, is_input)) if inside else None

    @contextmanager
    def replaced_by(self, calls: Sequence[LayerCall | None]) -> Iterator[None]:
        """Within the context, `calls` compute the layers; None leaves a layer as it is."""
        before, self._calls = self._calls, calls
        try:
            yield
        finally:
            self._calls = before

    @contextmanager
    def recorded(self, tokens: int) -> Iterator[Record]:
        """Within the context, one forward pass of so many tokens is taken down."""
        record = Record(tokens, [], [])

        def recorder(compute: LayerCall) -> LayerCall:
            def call(*args: object, **kwargs: object) -> object:
                output = compute(*args, **kwargs)
                record.inputs.append((args, kwargs))
                record.outputs.append(output)
                return output

            return call

        with self.replaced_by([recorder(compute) for compute in self._own]):
            yield record

    def _dispatch(self, index: int) -> LayerCall:
        def forward(*args: object, **kwargs: object) -> object:
            return (self._calls[index] or self._own[index])(*args, **kwargs)

        return forward


def _find(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The path of the list of a model's layers, and the layers."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _signature(layer: nn.Module) -> object:
    """All that tells one layer's computation from another's, but for the values of tensors."""
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
    """A copy without hooks, and without tensors: they are to be given with each call."""
    memo: dict[int, object] = {id(each): torch.empty(0) for each in layer.buffers()}
    memo |= {
        id(each): nn.Parameter(torch.empty(0), requires_grad=False) for each in layer.parameters()
    }
    template = copy.deepcopy(layer, memo)
    for module in template.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return template
