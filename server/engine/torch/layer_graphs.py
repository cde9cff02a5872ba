"""Graphs of decoder layers: compiled ahead of their use, and compared with the layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from server.engine.torch.attention_step import AttentionStep
from server.engine.torch.decoder import DecoderLayers, Record, template_of
from server.engine.torch.packed import OneProduct
from steering.affine import AffineMap
from steering.bank import SiteMaps
from steering.site_edit import CHILD, SiteEdit, site_tensors

_OPTIONS: Final[Mapping[str, Any]] = {
    # What a layer's fused loops compute is small beside its products. On two cores, threads of
    # their own would fight for them with those of the products.
    "cpp.threads": 1,
    "compile_threads": 1,  # no pool of processes
    "size_asserts": False,  # packed weights have no strides
    "post_grad_custom_pre_pass": OneProduct(),
    # All that guards would check is constant here, but for the number of tokens.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}
# Of a layer's output, compiled and not, in the norm.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 1e-2}

Tensors: TypeAlias = Mapping[str, Tensor]
# A layer's tensors, what its edits take of the step, and the layer's own arguments.
_Inputs: TypeAlias = tuple[Tensors, Tensors, Sequence[object], Mapping[str, object]]
Graph: TypeAlias = Callable[[Tensors, Tensors, Sequence[object], Mapping[str, object]], object]


@dataclass(frozen=True, slots=True)
class Variant:
    """What a graph is made for."""

    structure: int  # of the layer, see `DecoderLayers.structures`
    sites: tuple["Site", ...] = ()  # that are edited
    depth: int = 0  # places in the stacks of affine edits


@dataclass(frozen=True, slots=True)
class Site:
    """An edited module of a layer, and the shape of the bank's maps for it."""

    path: str
    slots: int
    width: int
    has_support: bool


@dataclass(frozen=True, slots=True)
class Graphs:
    """Of one variant, two: a compiler takes the number 1 for a constant."""

    one_token: Graph
    more_tokens: Graph


@dataclass(frozen=True, slots=True)
class Probe:
    """What the layers did in a forward pass, for a graph to be made and checked with."""

    record: Record
    attention: AttentionStep


class CompiledWronglyError(Exception):
    """What a compiler made gives other results."""


def make_graphs(layers: DecoderLayers, probes: Sequence[Probe], variant: Variant) -> Graphs:
    """Compile a variant for one token and for more, and compare with what is not compiled.

    Args:
        probes: of a forward pass of one token, and of one of several.

    Raises:
        CompiledWronglyError: they differ. A compiler may raise anything else.
    """
    template = _template(layers.structures[variant.structure], variant)

    def run(
        tensors: Tensors, step: Tensors, args: Sequence[object], kwargs: Mapping[str, Any]
    ) -> object:
        named = dict(tensors)
        for site in variant.sites:
            named |= named_tensors(site.path, step)
        return functional_call(template, named, tuple(args), dict(kwargs), strict=True)

    return Graphs(*(_graph(layers, variant, run, probe) for probe in probes))


def _graph(layers: DecoderLayers, variant: Variant, run: Graph, probe: Probe) -> Graph:
    alike = [i for i, each in enumerate(layers.structure_of) if each == variant.structure]
    maps, step = _example_maps(variant), _example_step(variant, probe.record.tokens)

    def inputs(index: int) -> _Inputs:
        args, kwargs = probe.record.inputs[index]
        tensors = {**layers.tensors[index], **maps}
        return tensors, step, args, {**kwargs, "layer_index": layers.positions[index]}

    with probe.attention.current():
        graph = _compiled_ahead(run, inputs(alike[0]), probe.record.tokens)
        for index in alike:
            expected = run(*inputs(index)) if variant.sites else probe.record.outputs[index]
            _compare(graph(*inputs(index)), expected)
    return graph


def named_tensors(path: str, tensors: Tensors) -> dict[str, Tensor]:
    """What a site's edit takes, by the names that it has in the layer."""
    return {f"{path}.{CHILD}.{name}": tensor for name, tensor in tensors.items()}


def _template(structure: nn.Module, variant: Variant) -> nn.Module:
    """A layer that edits its sites, all of whose tensors are given with each call."""
    template = template_of(structure)
    for site in variant.sites:
        SiteEdit.install(template.get_submodule(site.path), variant.depth, site.has_support)
    return template


def _example_maps(variant: Variant) -> dict[str, Tensor]:
    """Of a bank whose first slot is filled."""
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for site in variant.sites:
        maps = SiteMaps(site.slots, site.width, torch.device("cpu"))
        low, high = (torch.full((site.width,), bound) for bound in (-1.0, 1.0))
        maps.put(
            1,
            AffineMap(
                weight=torch.rand(site.width, generator=random),
                bias=torch.rand(site.width, generator=random),
                low=low if site.has_support else None,
                high=high if site.has_support else None,
            ),
        )
        inputs |= named_tensors(site.path, site_tensors(maps))
    return inputs


def _example_step(variant: Variant, tokens: int) -> Tensors:
    """A step that edits every second token or so."""
    if not variant.sites:
        return {}
    slots = torch.arange(tokens * variant.depth).remainder(2).view(variant.depth, tokens)
    return {
        "slots": slots,
        "strength": torch.full((variant.depth, tokens, 1), 0.5),
        "doses": torch.zeros(2, variant.depth, tokens),
    }


def _compiled_ahead(run: Graph, inputs: _Inputs, tokens: int) -> Graph:
    if tokens > 1:
        # Not of weights and maps, whose sizes may be the same number by chance.
        for tensor in tree_leaves(inputs[1:]):
            for dim, size in enumerate(tensor.shape if isinstance(tensor, Tensor) else ()):
                if size == tokens:
                    torch._dynamo.mark_dynamic(tensor, dim)
    # A copy: torch takes something out of it.
    compiled: Any = torch.compile(run, fullgraph=True, options=dict(_OPTIONS))
    # Numbers of the model's code are constants, as those of its configuration are.
    with torch._dynamo.config.patch(specialize_float=True):
        ahead = compiled.aot_compile((inputs, {}))
    ahead.disable_guard_check()
    graph: Graph = ahead
    return graph


def _compare(got: object, expected: object) -> None:
    """Raise CompiledWronglyError unless two outputs of a layer are the same, nearly."""
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            difference = float((one - other).norm() / other.norm())
            if not difference < _TOLERANCE[other.dtype]:
                raise CompiledWronglyError(f"a compiled layer is off by {difference:.2g}")
