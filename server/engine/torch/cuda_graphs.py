"""Decoding by replayed CUDA graphs: one launch in place of hundreds.

A graph holds the model's decoder, from token ids to the hidden states of all rows, with the affine
edits at its sites. What follows (reward edits, `lm_head`) is a few launches, and runs as the model
has it. Contents of the inputs change from step to step, addresses do not. One graph serves a number
of rows, a number of stacked affine edits, and whether they are measured.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.batch import Batch
from server.engine.torch.decode_inputs import DecodeInputs, DecodeShape
from server.engine.torch.decoder_call import Decoder
from server.engine.torch.graph_capture import Capture
from server.engine.torch.page_pool import PAGE
from server.engine.torch.paged_attention import PagedMemory, PagedStep
from server.engine.torch.staged_runner import StagedRunner, paged_step
from server.engine.torch.staging import route_tensors, with_route_tensors
from server.engine.torch.transfer import stage
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks
from steering.route import Route

logger = logging.getLogger(__name__)

# Of the hidden states, replayed and not, in the norm. The same kernels run in both.
_TOLERANCE: Final = 1e-3


class GraphError(Exception):
    """A graph gives something else than the model."""


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: DecodeInputs
    replay: Callable[[], None]
    hidden: Tensor  # (1, rows, width), the decoder's
    doses: dict[int, tuple[Tensor, Tensor]]  # see `DoseMeter.affine_sums`
    output: type  # of the decoder


@dataclass(frozen=True, slots=True)
class _Key:
    rows: int
    depth: int
    measured: bool


class GraphRunner(StagedRunner):
    """Replays a graph for each step in which all sequences decode; runs others as they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: SteeringHooks,
        memory: PagedMemory,
        max_rows: int,
        max_tokens: int,
        capture: Capture,
    ) -> None:
        """`max_rows` bounds the sequences of a step, `max_tokens` the tokens of each."""
        super().__init__(model, hooks, memory.device)
        assert not memory.form.gathers, "what is gathered has another shape in every step"
        self._memory = memory
        self._capture = capture
        self._buckets = buckets(max_rows)
        self._pages = -(-max_tokens // PAGE)
        self._decoder = Decoder(model)
        self._graphs: dict[_Key, _Graph | None] = {}  # None: cannot be made
        self._bank: Bank | None = None  # whose edits the graphs hold,
        self._version = 0  # and which of its versions

    @property
    def graphs(self) -> int:
        """How many there are."""
        return sum(graph is not None for graph in self._graphs.values())

    @torch.inference_mode()
    def warm_up(self, bank: Bank, slot: int = 0, measured: bool = False) -> None:
        """Make the graphs of steps without edits, or with one of the maps in a slot.

        The largest first, so that all fit in its memory.
        """
        for rows in reversed(self._buckets):
            self._graph(_Key(rows, 1 if slot else 0, measured), bank, slot)

    @torch.inference_mode()
    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """As every runner's; see `Runner.run`."""
        rows = self._bucket(batch)
        if rows is None:
            return super().run(batch, bank, meter)
        depth = max((layer.depth + 1 for layer in batch.route.affine), default=0)
        slot = max(chain.from_iterable(layer.used for layer in batch.route.affine), default=0)
        key = _Key(rows, depth, measured=bool(depth) and meter is not None)
        graph = self._graph(key, bank, slot)
        if graph is None:
            return super().run(batch, bank, meter)
        step = paged_step(batch)
        graph.inputs.fill(batch, step.index)
        graph.replay()
        if meter is not None:
            tokens = batch.input_ids.numel()
            for place, (doses, edits) in graph.doses.items():
                meter.add_affine(place, doses[:tokens], edits[:tokens])
        return self._tail(graph, batch, bank, meter)

    def _bucket(self, batch: Batch) -> int | None:
        """The rows of the graph for a batch; None where it does not just decode."""
        tokens = batch.input_ids.numel()
        decodes = len(batch.spans) == len(batch.rows) == tokens
        if not decodes or paged_step(batch).index.most_keys > self._pages * PAGE:
            return None
        return next((rows for rows in self._buckets if rows >= tokens), None)

    def _tail(self, graph: _Graph, batch: Batch, bank: Bank, meter: DoseMeter | None) -> Tensor:
        """From the decoder's hidden states to logits, with the edits of rewards."""
        logits_rows, *rewards = stage(
            [batch.logits_rows, *route_tensors(_rewards(batch.route))], self._device
        )
        route = with_route_tensors(_rewards(batch.route), rewards, self._device)
        with (
            self._decoder.gives(graph.output, graph.hidden),
            self._hooks.routed(bank, route, meter),
        ):
            output = self._model(
                input_ids=graph.inputs.input_ids,
                position_ids=graph.inputs.position_ids,
                logits_to_keep=logits_rows,
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits[0].float()

    def _graph(self, key: _Key, bank: Bank, slot: int) -> _Graph | None:
        """The graph for a key, made if it has to be, and then checked with the edits of a slot."""
        if bank is not self._bank or bank.version != self._version:
            # Their edits read tensors that are no longer the bank's, or too few.
            self._graphs = {each: graph for each, graph in self._graphs.items() if not each.depth}
            self._bank, self._version = bank, bank.version
        if key not in self._graphs:
            try:
                self._graphs[key] = self._make(key, bank, slot)
            except Exception as error:
                logger.warning("steps of %d rows run without a graph: %s", key.rows, error)
                logger.debug("capturing failed", exc_info=True)
                self._graphs[key] = None
        return self._graphs[key]

    def _make(self, key: _Key, bank: Bank, slot: int) -> _Graph:
        """Capture, and compare with the model, on other inputs than those of the capture.

        Raises:
            GraphError: a replay gives something else.
        """
        inputs = DecodeInputs(DecodeShape(key.rows, key.depth, self._pages), self._device)
        step = PagedStep(self._memory.pool, self._memory.form, inputs.index())
        route = inputs.route()
        with step.current():
            captured = self._decoder.call_of(self._model, inputs)
        places: list[int] = []

        def compute() -> Sequence[Tensor]:
            meter = DoseMeter(key.rows, 0) if key.measured else None
            with step.current(), self._hooks.routed(bank, route, meter):
                hidden: Tensor = captured.call().last_hidden_state
            sums = meter.affine_sums() if meter is not None else {}
            places[:] = sums
            return hidden, *(tensor for pair in sums.values() for tensor in pair)

        replay, (hidden, *sums) = self._capture(compute)
        vocabulary: int = self._model.config.get_text_config().vocab_size
        inputs.fill_example(vocabulary, slot)
        with step.current(), self._hooks.routed(bank, route):
            expected = self._decoder.call_of(self._model, inputs).hidden
        replay()
        difference = float((hidden - expected).float().norm() / expected.float().norm())
        if not difference < _TOLERANCE:
            raise GraphError(f"a replayed step is off by {difference:.2g}")
        doses = dict(zip(places, zip(sums[::2], sums[1::2], strict=True), strict=True))
        return _Graph(inputs, replay, hidden, doses, captured.output)


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that there are graphs for: powers of two, and the largest."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)


def _rewards(route: Route) -> Route:
    return replace(route, affine=())
