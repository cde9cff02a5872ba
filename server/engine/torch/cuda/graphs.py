"""Decodes by replaying CUDA graphs: one launch in place of hundreds.

A graph holds the model's decoder, from token ids to the hidden states of all rows, with the affine
edits at its sites, and measures their doses. Reward edits and `lm_head` run after it without a
graph: the host makes their launches, a fixed number, while the device still computes the graph. In
graphs they would double the number of graphs. The inputs' contents change from step to step, their
addresses do not. Each graph serves one number of rows and one depth of stacked affine edits.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_attention import PagedMemory, PagedStep
from server.engine.torch.cuda.capture import Capture
from server.engine.torch.cuda.decode_inputs import DecodeInputs
from server.engine.torch.cuda.decoder_call import Decoder
from server.engine.torch.model.devices import has_failed
from server.engine.torch.model.transfer import to_device
from server.engine.torch.step.batch import Batch
from server.engine.torch.step.graph_keys import MAX_DEPTH, GraphKey, buckets
from server.engine.torch.step.staged_runner import StagedRunner, paged_step
from steering.bank import Bank, SitePart
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks

logger = logging.getLogger(__name__)

# The largest relative difference, in the norm, of the hidden states between a replay and the model
# without a graph. Both run the same kernels.
_TOLERANCE: Final = 1e-3


class GraphError(Exception):
    """A graph's results differ from the model's, or would lack an edit."""


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: DecodeInputs
    replay: Callable[[], None]
    hidden: Tensor  # (1, rows, width), the decoder's last hidden states
    doses: Tensor  # see `DoseMeter.affine`
    output: type  # the class of the decoder's output
    parts: frozenset[SitePart]  # the parts of the bank's maps that the graph applies


class GraphRunner(StagedRunner):
    """Replays a graph for each step in which all sequences decode; runs other steps without one.

    A graph that a step could have used, and that is not made yet, is pending; no step waits for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: SteeringHooks,
        memory: PagedMemory,
        max_rows: int,
        max_tokens: int,
        capture: Capture,
        bank: Bank,
    ) -> None:
        """`max_rows` bounds the sequences of a step, `max_tokens` the tokens of each.

        `bank` is the one whose edits the graphs hold.
        """
        super().__init__(model, hooks, memory.device)
        self._memory = memory
        self._capture = capture
        self._buckets = buckets(max_rows)
        self._pages = -(-max_tokens // PAGE)
        self._decoder = Decoder(model)
        self._bank = bank
        self._graphs: dict[GraphKey, _Graph | None] = {}  # None: cannot be made
        self._pending: dict[GraphKey, None] = {}  # pending, in the order in which steps wanted them

    @property
    def graphs(self) -> int:
        """The number of graphs that have been made."""
        return sum(graph is not None for graph in self._graphs.values())

    @property
    def pending(self) -> int:
        """The number of graphs that steps could have used, and that are not made yet."""
        return len(self._pending)

    @torch.inference_mode()
    def warm_up(self, slot: int = 0) -> None:
        """Make the graphs of steps without affine edits or, given a slot, with one.

        The largest graph is made first, so that the others fit into its memory.

        Args:
            slot: an affine intervention's slot, whose maps the graphs are checked with; or 0.

        Raises:
            Exception: a graph cannot be made, or its results differ from the model's.
        """
        for rows in reversed(self._buckets):
            key = GraphKey(rows, 1 if slot else 0)
            self._graphs[key] = self._make(key, slot)

    @torch.inference_mode()
    def make_pending(self) -> bool:
        """Make one pending graph; False if there is none that can be made now.

        To be called while there are no steps to compute.

        Raises:
            Exception: the device has failed, and computes nothing any more.
        """
        for key in tuple(self._pending):
            slot = self._bank.affine_slot() if key.depth else 0
            if slot is None:  # no affine intervention is loaded that could use or check the graph
                continue
            del self._pending[key]
            try:
                self._graphs[key] = self._make(key, slot)
            except Exception as error:
                if has_failed(self._device):
                    raise
                logger.warning(
                    "steps of %d rows and %d edits run without a CUDA graph, which is slower, as "
                    "with --no-cuda-graphs: %s",
                    *(key.rows, key.depth, error),
                )
                logger.debug("capturing failed", exc_info=True)
                self._graphs[key] = None
            return True
        self._pending.clear()
        return False

    @torch.inference_mode()
    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """Compute the logits of the batch's rows, by a graph if there is one; see `Runner.run`."""
        graph = self._graph(batch) if bank is self._bank else None
        if graph is None:
            return super().run(batch, bank, meter)
        step = paged_step(batch)
        graph.inputs.fill(batch, step.index)
        graph.replay()
        if meter is not None:
            _, depth, _ = graph.doses.shape
            own = meter.affine_doses(tuple(range(depth)), self._device)
            own += graph.doses[:, :, : batch.input_ids.numel()]
        return self._logits_after_decoder(graph, batch, bank, meter)

    def _graph(self, batch: Batch) -> _Graph | None:
        """Return the graph for a step, or None; a missing one that can be made becomes pending."""
        rows = self._bucket(batch)
        if rows is None:
            return None
        affine = batch.route.affine
        depth = 0 if affine is None else affine.indices[-1] + 1
        if depth > MAX_DEPTH:
            return None
        key = GraphKey(rows, depth)
        if key not in self._graphs:
            self._pending[key] = None
            return None
        graph = self._graphs[key]
        used = (
            frozenset[int]() if affine is None or affine.used_slots is None else affine.used_slots
        )
        if graph is not None and not self._bank.parts_used(used) <= graph.parts:
            # The graph was made before a map was loaded that has a new site, or the first support
            # or gate at one.
            self._pending[key] = None
            return None
        return graph

    def _bucket(self, batch: Batch) -> int | None:
        """Return the rows of the graph for a batch; None where no graph can serve the batch."""
        tokens = batch.input_ids.numel()
        decodes = len(batch.spans) == len(batch.rows) == tokens
        if not decodes or paged_step(batch).index.max_keys > self._pages * PAGE:
            return None
        return next((rows for rows in self._buckets if rows >= tokens), None)

    def _logits_after_decoder(
        self, graph: _Graph, batch: Batch, bank: Bank, meter: DoseMeter | None
    ) -> Tensor:
        """Compute logits from the decoder's hidden states, with the reward edits."""
        route = replace(batch.route, affine=None)
        logits_rows, *rewards = to_device([batch.logits_rows, *route.tensors()], self._device)
        route = route.with_tensors(rewards, self._device)
        with (
            self._decoder.returning(graph.output, graph.hidden),
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

    def _make(self, key: GraphKey, slot: int) -> _Graph:
        """Capture a graph, and compare it with the model, edited by a slot, on new inputs.

        Raises:
            GraphError: the graph's results differ, or it would leave a site unedited.
        """
        parts = self._bank.allocated_parts if key.depth else frozenset[SitePart]()
        if outside := sorted(
            {part.site for part in parts if not self._decoder.contains(part.site)}
        ):
            raise GraphError(f"{', '.join(outside)} is outside of the decoder, and in no graph")
        inputs = DecodeInputs(key, self._pages, self._device)
        step = PagedStep(self._memory.pool, self._memory.attend, inputs.index(self._memory.tiling))
        route = inputs.route()
        with step.activate():
            captured = self._decoder.capture_call(self._model, inputs)

        def compute() -> Sequence[Tensor]:
            meter = DoseMeter(key.rows, 0)
            indices = () if route.affine is None else route.affine.indices
            doses = meter.affine_doses(indices, self._device)
            with step.activate(), self._hooks.routed(self._bank, route, meter):
                hidden: Tensor = captured.call().last_hidden_state
            return hidden, doses

        replay, (hidden, doses) = self._capture(compute)
        vocabulary: int = self._model.config.get_text_config().vocab_size
        inputs.fill_example(vocabulary, slot)
        with step.activate(), self._hooks.routed(self._bank, route):
            expected = self._decoder.capture_call(self._model, inputs).hidden
        replay()
        difference = float((hidden - expected).float().norm() / expected.float().norm())
        if not difference < _TOLERANCE:
            raise GraphError(f"a replayed step is off by {difference:.2g}")
        return _Graph(inputs, replay, hidden, doses, captured.output, parts)
