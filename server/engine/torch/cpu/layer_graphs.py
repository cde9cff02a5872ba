"""Compiles graphs of decoder layers ahead of their use, and compares them with the layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from server.engine.torch.cpu.ahead import compare, compile_ahead
from server.engine.torch.step.decoder import DecoderLayers, RecordedStep, template_of
from steering.affine import AffineMap, Gate
from steering.site_edit import SiteEdit, named_tensors, site_tensors
from steering.site_maps import MapPart, SiteMaps
from steering.sites import SiteLocation

Tensors: TypeAlias = Mapping[str, Tensor]
# A layer's tensors, the step's inputs of its edits, and the layer's own arguments.
_Inputs: TypeAlias = tuple[Tensors, Tensors, Sequence[object], Mapping[str, object]]
Graph: TypeAlias = Callable[[Tensors, Tensors, Sequence[object], Mapping[str, object]], object]


@dataclass(frozen=True, slots=True)
class Variant:
    """The kind of layer, and of its edits, that a graph computes."""

    structure: int  # index into `DecoderLayers.structures`
    sites: tuple["EditedSite", ...] = ()  # the edited sites
    depth: int = 0  # number of affine edits in the deepest stack


@dataclass(frozen=True, slots=True)
class EditedSite:
    """An edited site of a layer, and the shape of the bank's maps for it."""

    location: SiteLocation  # in the layer
    slots: int
    width: int
    parts: frozenset[MapPart]  # the parts that the maps have there


@dataclass(frozen=True, slots=True)
class Graphs:
    """The two graphs of one variant: the compiler would treat a size of 1 as a constant."""

    one_token: Graph
    more_tokens: Graph


def make_graphs(
    layers: DecoderLayers, recorded: Sequence[RecordedStep], variant: Variant
) -> Graphs:
    """Compile a variant for one token and for several, and compare with the uncompiled layers.

    Args:
        recorded: a forward pass of one token, and one of several tokens.

    Raises:
        CompiledWronglyError: a graph gives other results.
        Exception: any; a compiler may raise what it likes.
    """
    template = _template(layers.structures[variant.structure], variant)

    def run(
        tensors: Tensors, step: Tensors, args: Sequence[object], kwargs: Mapping[str, Any]
    ) -> object:
        named = dict(tensors)
        for site in variant.sites:
            named |= named_tensors(site.location, step)
        return functional_call(template, named, tuple(args), dict(kwargs), strict=True)

    return Graphs(*(_graph(layers, variant, run, each) for each in recorded))


def _graph(layers: DecoderLayers, variant: Variant, run: Graph, recorded: RecordedStep) -> Graph:
    alike = [i for i, each in enumerate(layers.structure_of) if each == variant.structure]
    maps, step = _example_maps(variant), _example_step(variant, recorded.tokens)

    def inputs(index: int) -> _Inputs:
        args, kwargs = recorded.inputs[index]
        tensors = {**layers.tensors[index], **maps}
        return tensors, step, args, {**kwargs, "layer_index": layers.index_tensors[index]}

    with recorded.attention.activate():
        graph = _compiled_ahead(run, inputs(alike[0]), recorded.tokens)
        for index in alike:
            expected = run(*inputs(index)) if variant.sites else recorded.outputs[index]
            compare(graph(*inputs(index)), expected)
    return graph


def _template(structure: nn.Module, variant: Variant) -> nn.Module:
    """Return a layer that edits the variant's sites, and gets all its tensors with each call."""
    template = template_of(structure)
    for site in variant.sites:
        SiteEdit.install(template.get_submodule(site.location.module), site.location, site.parts)
    return template


def _example_maps(variant: Variant) -> dict[str, Tensor]:
    """Return the maps of a bank whose slot 1 is filled, named as the graph's inputs."""
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for site in variant.sites:
        maps = SiteMaps(site.slots, site.width, torch.device("cpu"))
        maps.put(1, _example_map(site, random))
        inputs |= named_tensors(site.location, site_tensors(maps.table))
    return inputs


def _example_map(site: EditedSite, random: torch.Generator) -> AffineMap:
    """Return a map with all the parts that maps have at a site."""
    low, high = (torch.full((site.width,), bound) for bound in (-1.0, 1.0))
    supported = MapPart.SUPPORT in site.parts
    gate = Gate(
        torch.rand(site.width, generator=random) / site.width, torch.rand((), generator=random)
    )
    return AffineMap(
        weight=torch.rand(site.width, generator=random),
        bias=torch.rand(site.width, generator=random),
        low=low if supported else None,
        high=high if supported else None,
        gate=gate if MapPart.GATE in site.parts else None,
    )


def _example_step(variant: Variant, tokens: int) -> Tensors:
    """Return the edits' inputs for a step in which about every second token is edited."""
    if not variant.sites:
        return {}
    slots = torch.arange(tokens * variant.depth).remainder(2).view(variant.depth, tokens)
    return {
        "slots": slots,
        "strength": torch.full((variant.depth, tokens), 0.5),
        "doses": torch.zeros(2, variant.depth, tokens),
    }


def _compiled_ahead(run: Graph, inputs: _Inputs, tokens: int) -> Graph:
    if tokens > 1:
        # Weights and maps (inputs[0]) are left out: their sizes may equal `tokens` by chance.
        for tensor in tree_leaves(inputs[1:]):
            for dim, size in enumerate(tensor.shape if isinstance(tensor, Tensor) else ()):
                if size == tokens:
                    torch._dynamo.mark_dynamic(tensor, dim)
    # For a single token, the compiler's loops compute the matrix products, so they use all threads.
    # For more tokens a library computes these; the loops are small, and more threads would only
    # compete with the library's for the processors.
    return compile_ahead(run, inputs, torch.get_num_threads() if tokens == 1 else 1)
