"""The engine's core: schedules, runs and postprocesses each step, without threads or asyncio."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from server.engine.errors import EngineError, NoBackgroundRoomError, StepFailedError
from server.engine.output import StepOutput
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.attention.backend import KVMemory
from server.engine.torch.kv_store import KVStore
from server.engine.torch.loaded_interventions import LoadedInterventions, Parameters
from server.engine.torch.model.devices import has_failed
from server.engine.torch.model.transfer import start_copy_to_host
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.postprocess import Delivery, Postprocessor
from server.engine.torch.sampling.sequence_outputs import SequenceOutputs
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Scheduler, StepPlan
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step.batch import Batch, build_batch
from server.engine.torch.step.runner import Runner
from steering.dose import DoseMeter
from steering.settings import SlottedEdit

logger = logging.getLogger(__name__)

# How long a piece of work between two steps may take.
_PIECE_STEPS: Final = 2.0  # times the duration of the last step, while there are steps to compute
_IDLE_PIECE_SECONDS: Final = 0.1  # while there are none


class ParametersMissingError(EngineError):
    """An admission lacks the parameters of interventions that are not loaded. No client sees it."""

    def __init__(self, digests: set[str]) -> None:
        super().__init__(", ".join(sorted(digests)))
        self.digests = digests


class EngineCore:
    """Owns the scheduler, the K/V memory, the model and the sampler. Used from one thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        runner: Runner,
        scheduler: Scheduler,
        memory: KVMemory,
        prefixes: PrefixCache[list[Tensor]],
        interventions: LoadedInterventions,
        eos_tokens: frozenset[int],
        check_invariants: bool,
        dose_interval: int,
    ) -> None:
        self.scheduler = scheduler
        self.interventions = interventions
        self._runner = runner
        self._vocabulary = Vocabulary(tokenizer.backend_tokenizer)
        self._eos_tokens = eos_tokens
        self._penalties = PenaltyTable(model.device)
        self._postprocessor = Postprocessor(self._vocabulary, self._penalties)
        self._check_invariants = check_invariants
        self._dose_interval = dose_interval
        self.steered_steps = 0
        self.measured_seconds = 0.0  # duration of all measured steps
        self.edit_seconds = 0.0  # duration of the edits in them
        self._device = model.device
        self.store = KVStore(memory, prefixes)
        self._outputs: dict[Sequence, SequenceOutputs] = {}
        self._step_seconds = 0.0  # duration of the last step

    def prepare(self, parameters: Parameters) -> bool:
        """Do one piece of the work that an intervention needs before it can be admitted.

        A piece takes about as long as two steps, so that running requests are not stalled. It is
        at least one probe batch, even if that takes longer.

        Returns:
            True if nothing is left to do.

        Raises:
            UnservableInterventionError: it does not fit the model, or an edit at one of its sites
                does not reach the logits.
        """
        seconds = _PIECE_STEPS * self._step_seconds if self.has_work else _IDLE_PIECE_SECONDS
        return self.interventions.prepare(parameters, seconds)

    def admit(
        self,
        sequences: Collection[Sequence],
        parameters: Mapping[str, Parameters],
        leader: Sequence | None = None,
    ) -> None:
        """Load and pin the sequences' interventions, then queue the sequences, all or none.

        Args:
            parameters: digest -> parameters, at least of the interventions that are not loaded.
            leader: the sequence that they follow, if any; it has a queue place reserved for them.

        Raises:
            ParametersMissingError: `parameters` lacks an intervention that is not loaded; nothing
                was done.
            NoBackgroundRoomError: there is no room for the background work among the sequences.
            QueueFullError: the waiting queue has no room for the sequences.
            BankFullError: no slot can be freed for an intervention.
            UnservableInterventionError: an edit does not reach the logits.
        """
        background = [sequence for sequence in sequences if sequence.request.background]
        if background:
            self.scheduler.check_background(*background)
        if leader is None:
            self.scheduler.check_room(sum(sequence.request.queue_places for sequence in sequences))
        digests = {digest for sequence in sequences for digest in sequence.digests}
        missing = self.interventions.missing(digests)
        if unread := missing - parameters.keys():
            raise ParametersMissingError(unread)
        slots: dict[str, int] = {}
        with ExitStack() as held:
            # Loaded interventions are pinned first, so that installing the others does not evict
            # them.
            for digest in sorted(digests, key=missing.__contains__):
                slots[digest] = self.interventions.pin_or_install(digest, parameters)
                held.callback(self.interventions.slots.unpin, digest)
            # Everything that may fail happens before the first sequence is queued.
            made = [SequenceOutputs(each, self._vocabulary, self._eos_tokens) for each in sequences]
            for sequence, outputs in zip(sequences, made, strict=True):
                self._queue(sequence, outputs, slots)
        if leader is not None:
            self.scheduler.leaders.discard(leader)

    def _queue(
        self, sequence: Sequence, outputs: SequenceOutputs, slots: Mapping[str, int]
    ) -> None:
        """Queue a sequence, and pin its interventions, which are in `slots`, on its behalf."""
        sequence.edits = tuple(
            SlottedEdit(slots[edit.digest], edit.settings)
            for edit in sequence.request.effective_edits
        )
        for digest in sequence.digests:
            self.interventions.slots.pin(digest)
        self._outputs[sequence] = outputs
        self.scheduler.add(sequence)
        self.store.prefixes.trim()

    def remove(self, sequence: Sequence) -> None:
        """Free everything that a sequence holds. Harmless when it has ended.

        Raises:
            Exception: one part could not be freed; all the others were.
        """
        if (outputs := self._outputs.pop(sequence, None)) is None:
            return
        # An ExitStack calls back in reverse order, and goes on when one callback raises.
        with ExitStack() as freeing:
            for digest in sequence.digests:
                freeing.callback(self.interventions.slots.unpin, digest)
            if outputs.penalties is not None:
                freeing.callback(self._penalties.free, outputs.penalties)
            freeing.callback(self.store.cache_and_free_lane, sequence)
            freeing.callback(self.scheduler.remove, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence, and the queue place of its follower. Harmless when it has ended."""
        self.scheduler.leaders.discard(sequence)
        self.remove(sequence)

    def clear(self) -> None:
        """Remove every sequence, and empty the prefix cache."""
        self.store.clear()
        self.scheduler.leaders.clear()
        for sequence in tuple(self._outputs):
            self.remove(sequence)

    @property
    def has_work(self) -> bool:
        """True if the next step has anything to compute."""
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.waiting or scheduler.background)

    @property
    def compiling(self) -> int:
        """The number of graphs that are being made or will be. Each makes later steps faster."""
        return self._runner.pending

    def make_pending(self) -> bool:
        """Do one piece of work that makes later steps faster. Return False if there is none.

        Call this only while there are no steps to compute.
        """
        return self._runner.make_pending()

    def step(self) -> list[Delivery]:
        """Compute one step, and return the outputs of the sequences that it advanced or ended."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        deliveries: list[Delivery] = [
            (each, NoBackgroundRoomError("background work was ended, as requests want its room"))
            for each in plan.dropped
        ]
        if plan.chunks:
            try:
                deliveries += self._compute(plan)
            except Exception:
                if has_failed(self._device):
                    raise
                logger.exception("a step of %d sequences failed", len(plan.chunks))
                error = StepFailedError("the engine failed while computing this request")
                deliveries += [(chunk.sequence, error) for chunk in plan.chunks]
        for sequence, output in deliveries:
            try:
                self._free_if_ended(sequence, output)
            except Exception:
                if has_failed(self._device):
                    raise
                logger.exception("what a request held could not be freed without an error")
        if self._check_invariants:
            self.check()
        self._step_seconds = time.perf_counter() - began
        return deliveries

    def _free_if_ended(self, sequence: Sequence, output: StepOutput | EngineError) -> None:
        """Free what a sequence holds if `output` is its last one."""
        if isinstance(output, EngineError):
            with ExitStack() as freeing:
                freeing.callback(self.cancel, sequence)
                freeing.callback(self.store.free_lane, sequence)
        elif output.finish_reason is not None:
            self.remove(sequence)

    def _compute(self, plan: StepPlan) -> list[Delivery]:
        for sequence in self.store.allocate_lanes(plan):
            self._outputs[sequence].mark_started()
        batch = build_batch(plan.chunks, self.store.lanes, self.store.memory, self._device)
        meter = self._meter(batch)
        began = time.perf_counter()
        logits = self._runner.run(batch, self.interventions.bank, meter)
        # Starts the copy; it is complete once the postprocessor has waited for the device.
        doses = start_copy_to_host(meter.sums(logits.device)) if meter is not None else None
        deliveries = self._postprocessor.run(plan.chunks, batch.rows, logits, self._outputs)
        self.store.cache_prompts(deliveries)
        if meter is None or doses is None:
            return deliveries
        if self._device.type == "cpu":  # a GPU runs asynchronously, so the clock tells nothing
            self.measured_seconds += time.perf_counter() - began - meter.measuring_seconds
            self.edit_seconds += meter.edit_seconds
        return _with_doses(deliveries, batch, meter.doses_of(doses, batch.spans))

    def _meter(self, batch: Batch) -> DoseMeter | None:
        """Return a meter for this step's edits, or None if the step is not to be measured.

        Measuring costs time, so only every `dose_interval`-th steered step has a meter.
        """
        if not self._dose_interval or not batch.route.edits_anything:
            return None
        self.steered_steps += 1
        if (self.steered_steps - 1) % self._dose_interval:
            return None
        return DoseMeter(batch.input_ids.numel(), len(batch.rows))

    def check(self) -> None:
        """Assert that all memory, pins and slots belong to living sequences."""
        scheduler = self.scheduler
        scheduler.check()
        running = {*scheduler.running, *scheduler.background}
        sequences = {*running, *scheduler.waiting}
        assert self._outputs.keys() == sequences, (
            "outputs without a sequence, or a sequence without"
        )
        self.store.check(running)
        penalties = (outputs.penalties for outputs in self._outputs.values())
        self._penalties.check([each for each in penalties if each is not None])
        pins = Counter(digest for sequence in sequences for digest in sequence.digests)
        self.interventions.slots.check(pins)


def _with_doses(
    deliveries: Iterable[Delivery], batch: Batch, doses: Items[tuple[float | None, ...]]
) -> list[Delivery]:
    """Return the outputs of a measured step, each with the doses of its own edits."""
    return [
        (sequence, output)
        if isinstance(output, EngineError)
        else (sequence, replace(output, doses=doses[batch.span_indices[sequence]]))
        for sequence, output in deliveries
    ]
