"""Decoder layers, compiled: one graph for all layers of one structure.

A layer's weights, the maps of its sites and the step's route are inputs of the graph, so that it
serves every layer and every mix of interventions. Graphs are made ahead of their use on a thread
of their own: no step ever waits for one. Until a graph is ready, and where none can be made, a
layer runs as it is, with its hooks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from server.engine.torch.background import Background
from server.engine.torch.decoder import DecoderLayers, LayerCall, Record, template_of
from server.engine.torch.slab_attention import AttentionStep
from steering.affine import AffineMap
from steering.bank import Bank, SiteMaps
from steering.dose import DoseMeter
from steering.route import Route
from steering.site_edit import CHILD, STEP_TENSORS, SiteEdit, site_tensors, step_tensors

logger = logging.getLogger(__name__)

_OPTIONS: Final[Mapping[str, Any]] = {
    # What a layer's fused loops compute is small beside its products. On two cores, threads of
    # their own would fight for them with those of the products.
    "cpp.threads": 1,
    "compile_threads": 1,  # no pool of processes
    "size_asserts": False,  # packed weights have no strides
    # All that guards would check is constant here, but for the number of tokens.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}
_MOST_PLANS: Final = 64
# Of a layer's output, compiled and not, in the norm.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 1e-2}

_Tensors: TypeAlias = Mapping[str, Tensor]
_Inputs: TypeAlias = tuple[_Tensors, Sequence[object], Mapping[str, object]]
Graph: TypeAlias = Callable[[_Tensors, Sequence[object], Mapping[str, object]], object]


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
class _Graphs:
    """A compiler takes the number 1 for a constant."""

    one_token: Graph
    more_tokens: Graph


@dataclass(frozen=True, slots=True)
class Probe:
    """What the layers did in a forward pass, for a graph to be made and checked with."""

    record: Record
    attention: AttentionStep


@dataclass(frozen=True, slots=True)
class _Layer:
    """How one layer is computed in a step."""

    variant: Variant
    tensors: _Tensors  # its own, and the maps of its sites
    position: Tensor  # () int64, which layer it is
    paths: tuple[str, ...]  # of the sites that are edited


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the layers are computed while the same sites are edited."""

    layers: list[_Layer]
    paths: frozenset[str]  # of all their edited sites


class CompiledWronglyError(Exception):
    """What a compiler made gives other results."""


class CompiledLayers:
    """Used on the engine thread, but for `_make`."""

    def __init__(self, layers: DecoderLayers, one_token: Probe, more_tokens: Probe) -> None:
        self._layers = layers
        self._probes = (one_token, more_tokens)
        self._graphs: dict[Variant, _Graphs] = {}
        self._asked: set[Variant] = set()
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._background = Background("compiler")
        for structure in range(len(layers.structures)):
            self._find(Variant(structure))

    @property
    def pending(self) -> int:
        """Variants that are being made, or wait for that."""
        return self._background.pending

    def expect(self, sites: Mapping[str, int], slots: int) -> None:
        """Have graphs made for one affine edit at some sites, before anybody wants it.

        Args:
            sites: module path -> width.
            slots: of the bank, the identity's among them.
        """
        edited: dict[int, list[Site]] = {}
        for site in sites:
            if (place := self._layers.place(site)) is not None:
                index, path = place
                edited.setdefault(index, []).append(Site(path, slots, sites[site], False))
        for index, found in edited.items():
            structure = self._layers.structure_of[index]
            self._find(Variant(structure, tuple(sorted(found, key=lambda each: each.path)), 1))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was asked for is made; False if it is not in `timeout` seconds."""
        return self._background.wait(timeout)

    @contextmanager
    def step(
        self, bank: Bank, route: Route, tokens: int, meter: DoseMeter | None = None
    ) -> Iterator[None]:
        """Within the context, a step's layers run compiled, where they are."""
        plan = self._plan(bank.acting(route), len(route.affine))
        edits = step_tensors(route, tokens) if plan.paths else {}
        inputs = {path: _named(path, edits) for path in plan.paths}
        with self._layers.replaced_by([self._call(layer, inputs, tokens) for layer in plan.layers]):
            yield
        if meter is not None and edits:
            for layer, doses, counts in zip(route.affine, *edits["doses"], strict=True):
                meter.add_affine(layer.depth, doses, counts)

    def _plan(self, acting: Mapping[str, SiteMaps], depth: int) -> "_Plan":
        """What does not change from one step to the next, as long as the same sites are edited."""
        key = (depth, *((site, maps, maps.low is None) for site, maps in acting.items()))
        if key not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(acting, depth)
        return self._plans[key]

    def _make_plan(self, acting: Mapping[str, SiteMaps], depth: int) -> "_Plan":
        layers = self._layers
        edited: list[dict[str, SiteMaps]] = [{} for _ in layers.modules]
        for site, maps in acting.items():
            if (place := layers.place(site)) is not None:
                index, path = place
                edited[index][path] = maps
        planned = []
        for index, found in enumerate(edited):
            sites = tuple(_site(path, maps) for path, maps in sorted(found.items()))
            variant = Variant(layers.structure_of[index], sites, depth if sites else 0)
            tensors = dict(layers.tensors[index])
            for path, maps in found.items():
                tensors |= _named(path, site_tensors(maps))
            planned.append(_Layer(variant, tensors, layers.positions[index], tuple(found)))
        return _Plan(planned, frozenset(path for found in edited for path in found))

    def _call(
        self, layer: "_Layer", inputs: Mapping[str, _Tensors], tokens: int
    ) -> LayerCall | None:
        """What computes a layer in this step; None: the layer itself."""
        graphs = self._find(layer.variant)
        if graphs is None:
            return None
        graph = graphs.one_token if tokens == 1 else graphs.more_tokens
        tensors = layer.tensors
        for path in layer.paths:
            tensors = {**tensors, **inputs[path]}

        def call(*args: object, **kwargs: object) -> object:
            kwargs["layer_index"] = layer.position
            return graph(tensors, args, kwargs)

        return call

    def _find(self, variant: Variant) -> _Graphs | None:
        """A variant's graphs, if they are ready; asks for them if nobody has."""
        if variant not in self._asked:
            self._asked.add(variant)
            self._background.run(lambda: self._make(variant))
        return self._graphs.get(variant)

    def _make(self, variant: Variant) -> None:
        """On the background's thread."""
        if variant.sites and Variant(variant.structure) not in self._graphs:
            return  # its layers are not alike, or there is no compiler; that was said then
        try:
            with torch.inference_mode():
                self._graphs[variant] = self._compile(variant)
        except Exception as error:
            logger.warning("layers run uncompiled, which is slower: %s", _first_line(error))
            logger.debug("compiling %s failed", variant, exc_info=True)
        else:
            logger.info("compiled the layers of %s", variant)

    def _compile(self, variant: Variant) -> _Graphs:
        template = _template(self._layers.structures[variant.structure], variant)

        def run(tensors: _Tensors, args: Sequence[object], kwargs: Mapping[str, Any]) -> object:
            return functional_call(template, dict(tensors), tuple(args), dict(kwargs), strict=True)

        return _Graphs(*(self._graph(variant, run, probe) for probe in self._probes))

    def _graph(self, variant: Variant, run: Graph, probe: Probe) -> Graph:
        """Compile, and compare with what is not compiled.

        Raises:
            CompiledWronglyError: they differ.
        """
        layers = self._layers
        alike = [i for i, each in enumerate(layers.structure_of) if each == variant.structure]
        edited = _example_edits(variant, probe.record.tokens)

        def inputs(index: int) -> _Inputs:
            args, kwargs = probe.record.inputs[index]
            tensors = {**layers.tensors[index], **edited}
            return tensors, args, {**kwargs, "layer_index": layers.positions[index]}

        with probe.attention.current():
            graph = _compiled_ahead(run, inputs(alike[0]), probe.record.tokens)
            for index in alike:
                expected = run(*inputs(index)) if edited else probe.record.outputs[index]
                _compare(graph(*inputs(index)), expected)
        return graph


def _site(path: str, maps: SiteMaps) -> Site:
    slots, width = maps.delta.shape
    return Site(path, slots, width, maps.low is not None)


def _named(path: str, tensors: _Tensors) -> dict[str, Tensor]:
    """What a site's edit takes, by the names that it has in the layer."""
    return {f"{path}.{CHILD}.{name}": tensor for name, tensor in tensors.items()}


def _template(structure: nn.Module, variant: Variant) -> nn.Module:
    """A layer that edits its sites, all of whose tensors are given with each call."""
    template = template_of(structure)
    for site in variant.sites:
        SiteEdit.install(template.get_submodule(site.path), variant.depth, site.has_support)
    return template


def _example_edits(variant: Variant, tokens: int) -> dict[str, Tensor]:
    """Inputs that edit every second token or so."""
    if not variant.sites:
        return {}
    random = torch.Generator().manual_seed(0)
    slots = torch.arange(tokens * variant.depth).remainder(2).view(variant.depth, tokens)
    edits = {
        "slots": slots,
        "strength": torch.full((variant.depth, tokens, 1), 0.5),
        "doses": torch.zeros(2, variant.depth, tokens),
    }
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
        inputs |= _named(site.path, site_tensors(maps)) | _named(site.path, edits)
    return inputs


def _compiled_ahead(run: Graph, inputs: _Inputs, tokens: int) -> Graph:
    tensors, args, kwargs = inputs
    if tokens > 1:
        # Not among weights and maps, whose sizes may be the same number by chance.
        edits = [each for name, each in tensors.items() if name.rpartition(".")[2] in STEP_TENSORS]
        for tensor in tree_leaves((edits, args, kwargs)):
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
