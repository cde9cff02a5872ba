"""Runs decoder layers compiled, with one graph for all layers of one structure.

A layer's weights, the maps of its sites and the step's route are inputs of the graph, so that it
serves every layer and every mix of interventions. Graphs are compiled on a background thread. The
ones for no edits and for one edit at the default sites are compiled at start, others once enough
steps have wanted them. No step waits for a graph: a layer without one runs uncompiled, with its
hooks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from server.engine.torch.cpu.ahead import prepare_compiler, warn_uncompiled
from server.engine.torch.cpu.background import BackgroundThread
from server.engine.torch.cpu.compiled_head import compile_head
from server.engine.torch.cpu.graph_store import GraphStore
from server.engine.torch.cpu.layer_graphs import (
    EditedSite,
    Graphs,
    Tensors,
    Variant,
    make_graphs,
)
from server.engine.torch.cpu.recurring import RecurrenceRule
from server.engine.torch.step.decoder import DecoderLayers, LayerCall, RecordedStep
from steering.affine import MapTable
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.route import AffineRoute, Route
from steering.site_edit import named_tensors, site_tensors, step_tensors
from steering.site_maps import MapPart, parts_in
from steering.sites import SiteLocation

logger = logging.getLogger(__name__)

_MAX_PLANS: Final = 64


@dataclass(frozen=True, slots=True)
class _Layer:
    """Says how one layer is computed in a step."""

    variant: int  # index into the plan's variants
    tensors: Tensors  # the layer's own, and the maps of its sites
    index: Tensor  # () int64, the layer's index


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """Says how all layers are computed, for one content of the bank and one set of used slots."""

    variants: tuple[Variant, ...]
    layers: list[_Layer]


class CompiledLayers:
    """Runs layers by their graphs, as far as these are ready.

    Used on the engine thread, except for the methods that the background thread runs.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        one_token: RecordedStep,
        more_tokens: RecordedStep,
        lm_head: nn.Module,
        rule: RecurrenceRule,
    ) -> None:
        """`rule` says when a mix of edits is worth graphs, unless `precompile` has named it."""
        self._layers = layers
        self._recorded = (one_token, more_tokens)
        self._plans: dict[tuple[Bank, int, frozenset[int] | None, int], _LayerPlan] = {}
        prepare_compiler()
        self._background = BackgroundThread("compiler")
        self._graphs = GraphStore(self._start_making, rule)
        for structure in range(len(layers.structures)):
            self._graphs.precompile(Variant(structure))
        self._background.run(lambda: self._make_head(lm_head))

    @property
    def pending(self) -> int:
        """The number of compilations that run or wait."""
        return self._background.pending

    def precompile(self, sites: Mapping[str, int], slots: int) -> None:
        """Have graphs compiled for one affine edit at some sites, before a request wants it.

        Args:
            sites: module path -> width.
            slots: the number of the bank's slots, the identity's included.
        """
        edited: dict[int, list[EditedSite]] = {}
        for site in sites:
            if (location := self._layers.locate(site)) is not None:
                index, inside = location
                plain = EditedSite(inside, slots, sites[site], frozenset({MapPart.MAP}))
                edited.setdefault(index, []).append(plain)
        for index, found in edited.items():
            structure = self._layers.structure_of[index]
            ordered = tuple(sorted(found, key=lambda each: each.location))
            self._graphs.precompile(Variant(structure, ordered, 1))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for all compilations. Return False if some are left after `timeout` seconds."""
        return self._background.wait(timeout)

    @contextmanager
    def step(
        self, bank: Bank, route: Route, tokens: int, meter: DoseMeter | None = None
    ) -> Iterator[None]:
        """Within the context, the layers whose graphs are ready run compiled."""
        plan = self._plan(bank, route.affine)
        steered = route.affine is not None and any(variant.sites for variant in plan.variants)
        edits = step_tensors(route.affine, tokens, meter) if route.affine and steered else {}
        calls = [self._calls(variant, edits, tokens) for variant in plan.variants]
        with self._layers.replaced_by([calls[layer.variant](layer) for layer in plan.layers]):
            yield

    def _plan(self, bank: Bank, route: AffineRoute | None) -> _LayerPlan:
        used = frozenset[int]() if route is None else route.used_slots
        depth = 0 if route is None else len(route.indices)
        key = bank, bank.slot_changes, used, depth
        if key not in self._plans:
            if len(self._plans) == _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(
                {} if route is None else bank.tables_for(route), depth
            )
        return self._plans[key]

    def _make_plan(self, tables: Mapping[str, MapTable], depth: int) -> _LayerPlan:
        layers = self._layers
        edited: list[dict[SiteLocation, MapTable]] = [{} for _ in layers.modules]
        for site, table in tables.items():
            if (location := layers.locate(site)) is not None:
                index, inside = location
                edited[index][inside] = table
        variants: dict[Variant, int] = {}
        planned = []
        for index, found in enumerate(edited):
            sites = tuple(_site(location, found[location]) for location in sorted(found))
            variant = Variant(layers.structure_of[index], sites, depth if sites else 0)
            tensors = dict(layers.tensors[index])
            for inside, table in found.items():
                tensors |= named_tensors(inside, site_tensors(table))
            number = variants.setdefault(variant, len(variants))
            planned.append(_Layer(number, tensors, layers.index_tensors[index]))
        return _LayerPlan(tuple(variants), planned)

    def _calls(
        self, variant: Variant, edits: Tensors, tokens: int
    ) -> Callable[[_Layer], LayerCall | None]:
        """Return a function that gives each layer of a variant its call of a graph in this step.

        It gives None to layers that run uncompiled.
        """
        graphs = self._graphs.find(variant)
        if graphs is None:
            return lambda _layer: None
        graph = graphs.one_token if tokens == 1 else graphs.more_tokens
        own = edits if variant.sites else {}

        def call_of(layer: _Layer) -> LayerCall:
            def call(*args: object, **kwargs: object) -> object:
                kwargs["layer_index"] = layer.index
                return graph(layer.tensors, own, args, kwargs)

            return call

        return call_of

    def _start_making(self, variant: Variant) -> None:
        self._background.run(lambda: self._graphs.set_graphs(variant, self._make(variant)))

    def _make(self, variant: Variant) -> Graphs | None:
        """Compile a variant's graphs; None if that fails. Runs on the background thread."""
        if variant.sites and not self._graphs.has_graphs(Variant(variant.structure)):
            return None  # it failed to compile without edits, which was logged
        try:
            with torch.inference_mode():
                graphs = make_graphs(self._layers, self._recorded, variant)
        except Exception as error:
            warn_uncompiled("layers run", variant, error)
            return None
        logger.info("compiled the layers of %s", variant)
        return graphs

    def _make_head(self, lm_head: nn.Module) -> None:
        """Compile `lm_head`, if layers could be compiled. Runs on the background thread."""
        if not self._graphs.has_graphs(Variant(0)):
            return  # most likely there is no compiler, which was logged
        try:
            with torch.inference_mode():
                compile_head(lm_head)
        except Exception as error:
            warn_uncompiled("lm_head runs", lm_head, error)


def _site(location: SiteLocation, table: MapTable) -> EditedSite:
    slots, width = table.delta.shape
    return EditedSite(location, slots, width, parts_in(table))
