"""The engine's inside: a step is schedule, run, postprocess. No thread, no asyncio."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from server.engine.base import EngineError, StepFailedError
from server.engine.torch.answer import Answer
from server.engine.torch.batch import build_batch
from server.engine.torch.detokenizer import Detokenizer
from server.engine.torch.interventions import LoadedInterventions, Parameters
from server.engine.torch.postprocess import Delivery, Postprocessor
from server.engine.torch.runner import Runner
from server.engine.torch.scheduler import Plan, Scheduler
from server.engine.torch.sequence import Sequence
from server.engine.torch.slab import Slab, SlabShape
from server.engine.torch.vocabulary import Vocabulary
from steering.settings import SlottedEdit

logger = logging.getLogger(__name__)


class NotReadError(Exception):
    """An admission needs the parameters of interventions that are not loaded."""

    def __init__(self, digests: set[str]) -> None:
        super().__init__(", ".join(sorted(digests)))
        self.digests = digests


class EngineCore:
    """Scheduler, K/V slabs, model and sampler. Used from one thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        runner: Runner,
        scheduler: Scheduler,
        interventions: LoadedInterventions,
        eos_tokens: frozenset[int],
        check_invariants: bool,
    ) -> None:
        self.scheduler = scheduler
        self.interventions = interventions
        self._runner = runner
        self._tokenizer = tokenizer.backend_tokenizer
        self._postprocessor = Postprocessor(Vocabulary(self._tokenizer), eos_tokens)
        self._check_invariants = check_invariants
        self._device = model.device
        self._slab_shape = SlabShape.of(model)
        self._slabs: dict[Sequence, Slab] = {}
        self._answers: dict[Sequence, Answer] = {}

    def admit(self, sequences: Collection[Sequence], parameters: Mapping[str, Parameters]) -> None:
        """Queue sequences, all or none, with their interventions in slots and pinned.

        Args:
            parameters: of at least those interventions that are not loaded.

        Raises:
            NotReadError: `parameters` lacks some; nothing was done.
            QueueFullError: the waiting queue has no room for them.
            BankFullError: a slot cannot be freed.
            UnservableInterventionError: an edit does not reach the logits.
        """
        self.scheduler.check_room(len(sequences))
        digests = {digest for sequence in sequences for digest in sequence.digests}
        missing = self.interventions.missing(digests)
        if unread := missing - parameters.keys():
            raise NotReadError(unread)
        slots: dict[str, int] = {}
        with ExitStack() as held:
            # What is loaded is held first, so that installing the rest does not evict it.
            for digest in sorted(digests, key=missing.__contains__):
                slots[digest] = self.interventions.hold(digest, parameters)
                held.callback(self.interventions.unpin, digest)
            # All that may fail comes before the first is queued.
            answers = [Answer(sequence, self._detokenizer(sequence)) for sequence in sequences]
            for sequence, answer in zip(sequences, answers, strict=True):
                self._queue(sequence, answer, slots)

    def _detokenizer(self, sequence: Sequence) -> Detokenizer:
        request = sequence.request
        return Detokenizer(self._tokenizer, request.sampling.stop, request.prompt)

    def _queue(self, sequence: Sequence, answer: Answer, slots: Mapping[str, int]) -> None:
        """Queue a sequence whose interventions are held in `slots`; it gets pins of its own."""
        sequence.edits = tuple(
            SlottedEdit(slots[edit.digest], edit.settings)
            for edit in sequence.request.effective_edits
        )
        for digest in sequence.digests:
            self.interventions.pin(digest)
        self._answers[sequence] = answer
        self.scheduler.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Free all that a sequence holds. Harmless when it has ended."""
        if self._answers.pop(sequence, None) is None:
            return
        self.scheduler.remove(sequence)
        self._slabs.pop(sequence, None)
        for digest in sequence.digests:
            self.interventions.unpin(digest)

    def clear(self) -> None:
        """Remove every sequence."""
        for sequence in tuple(self._answers):
            self.remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Delivery]:
        """Compute one step; the outputs of the sequences that it advanced."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return []
        try:
            self._make_room(plan)
            batch = build_batch(plan.chunks, self._slabs, self._device)
            logits = self._runner.run(batch, self.interventions.bank)
            deliveries = self._postprocessor.run(plan.chunks, batch.rows, logits, self._answers)
        except Exception:
            logger.exception("a step of %d sequences failed", len(plan.chunks))
            error = StepFailedError("the engine failed while computing this request")
            deliveries = [(chunk.sequence, error) for chunk in plan.chunks]
        for sequence, output in deliveries:
            if isinstance(output, EngineError) or output.finish_reason is not None:
                self.remove(sequence)
        if self._check_invariants:
            self.check()
        return deliveries

    def _make_room(self, plan: Plan) -> None:
        for sequence in plan.preempted:
            self._slabs.pop(sequence, None)
        for chunk in plan.chunks:
            if chunk.sequence not in self._slabs:
                self._slabs[chunk.sequence] = Slab(self._slab_shape)
                self._answers[chunk.sequence].start()
            self._slabs[chunk.sequence].reserve(chunk.end)

    def check(self) -> None:
        """Assert that nothing leaks: blocks, slabs, pins and slots belong to living sequences."""
        scheduler = self.scheduler
        scheduler.check()
        sequences = {*scheduler.running, *scheduler.waiting}
        assert self._answers.keys() == sequences, "an answer without a sequence, or none for one"
        assert self._slabs.keys() <= set(scheduler.running), "a slab that nobody uses"
        pins = Counter(digest for sequence in sequences for digest in sequence.digests)
        self.interventions.slots.check(pins)
