"""The engine's inside: a step is schedule, run, postprocess. No thread, no asyncio."""

import logging
import random
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from server.engine.base import (
    EngineError,
    InvalidRequestError,
    StepFailedError,
    StepOutput,
    TokenLogprobs,
)
from server.engine.torch.attention import Slab, SlabShape
from server.engine.torch.batch import build_batch
from server.engine.torch.detokenizer import Detokenizer
from server.engine.torch.interventions import LoadedInterventions, Parameters
from server.engine.torch.runner import Runner
from server.engine.torch.sampler import Draw, RowLogprobs, logprobs, sample
from server.engine.torch.scheduler import Chunk, Scheduler, Sequence
from server.engine.torch.vocabulary import Vocabulary
from steering.settings import SlottedEdit

logger = logging.getLogger(__name__)

Delivery: TypeAlias = tuple[Sequence, StepOutput | EngineError]


@dataclass(eq=False, slots=True)
class _Answer:
    """What belongs to a sequence beside its tokens, from admission to its end."""

    detokenizer: Detokenizer
    random: random.Random
    submitted: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None  # until it was first scheduled


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
    ) -> None:
        self.scheduler = scheduler
        self.interventions = interventions
        self._runner = runner
        self._tokenizer = tokenizer.backend_tokenizer
        self._vocabulary = Vocabulary(self._tokenizer)
        self._eos_tokens = eos_tokens
        self._device = model.device
        self._slab_shape = SlabShape.of(model)
        self._slabs: dict[Sequence, Slab] = {}
        self._answers: dict[Sequence, _Answer] = {}

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
            for sequence in sequences:
                self._queue(sequence, slots)

    def _queue(self, sequence: Sequence, slots: Mapping[str, int]) -> None:
        """Queue a sequence whose interventions are held in `slots`; it gets pins of its own."""
        request = sequence.request
        sequence.edits = tuple(
            SlottedEdit(slots[edit.digest], edit.settings) for edit in request.effective_edits
        )
        for digest in sequence.digests:
            self.interventions.pin(digest)
        self._answers[sequence] = _Answer(
            Detokenizer(self._tokenizer, request.sampling.stop),
            random.Random(request.sampling.seed),
        )
        self.scheduler.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Free all that a sequence holds. Harmless when it has ended."""
        if self._answers.pop(sequence, None) is None:
            return
        self.scheduler.remove(sequence)
        self._slabs.pop(sequence, None)
        for digest in sequence.digests:
            self.interventions.unpin(digest)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Delivery]:
        """Compute one step; the outputs of the sequences that it advanced."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        try:
            self._begin(chunks)
            batch = build_batch(chunks, self._slabs, self._device)
            logits = self._runner.run(batch, self.interventions.bank)
            return self._postprocess(chunks, logits)
        except Exception:
            logger.exception("a step of %d sequences failed", len(chunks))
            for chunk in chunks:
                self.remove(chunk.sequence)
            error = StepFailedError("the engine failed while computing this request")
            return [(chunk.sequence, error) for chunk in chunks]

    def _begin(self, chunks: list[Chunk]) -> None:
        """Give sequences that are scheduled for the first time their room."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence not in self._slabs:
                self._slabs[sequence] = Slab(self._slab_shape, sequence.max_length)
                answer = self._answers[sequence]
                answer.queue_seconds = time.monotonic() - answer.submitted

    def _postprocess(self, chunks: list[Chunk], logits: Tensor) -> list[Delivery]:
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        # Whether a chunk samples is asked before its sequence gets the next token.
        tokens = sample(logits, [self._draw(sequence) for sequence in sequences])
        rows = self._logprobs(sequences, tokens, logits)
        return [
            (sequence, self._outcome(sequence, token, row))
            for sequence, token, row in zip(sequences, tokens, rows, strict=True)
        ]

    def _outcome(
        self, sequence: Sequence, token: int | None, row: TokenLogprobs | None
    ) -> StepOutput | EngineError:
        """A sequence's share of the step. What fails here is this sequence's own."""
        if token is None:
            return self._give_up(sequence)
        try:
            return self._advance(sequence, token, row)
        except Exception:
            logger.exception("the text of a sequence failed")
            self.remove(sequence)
            return StepFailedError("the engine failed while computing this request")

    def _give_up(self, sequence: Sequence) -> EngineError:
        """End a sequence whose logits are not finite: another model than the one asked for."""
        self.remove(sequence)
        if not sequence.edits:
            return StepFailedError("the model's output is not a number")
        return InvalidRequestError(
            "Steered like this, the model's output is not a number; choose weaker settings.",
            "steering",
            "steering_overflow",
        )

    def _draw(self, sequence: Sequence) -> Draw:
        return Draw(sequence.request.sampling, self._answers[sequence].random.random())

    def _logprobs(
        self, sequences: list[Sequence], tokens: list[int | None], logits: Tensor
    ) -> list[TokenLogprobs | None]:
        """For the rows that ask for them and drew a token."""
        wanted = {
            row: (token, count)
            for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
            if token is not None and (count := sequence.request.sampling.logprobs) is not None
        }
        found: list[TokenLogprobs | None] = [None] * len(sequences)
        if wanted:
            drawn, counts = zip(*wanted.values(), strict=True)
            values = logprobs(logits[list(wanted)], drawn, counts)
            for row, token, value in zip(wanted, drawn, values, strict=True):
                found[row] = self._token_logprobs(token, value)
        return found

    def _token_logprobs(self, token: int, row: RowLogprobs) -> TokenLogprobs:
        return TokenLogprobs(
            chosen=self._vocabulary.scored(token, row.sampled),
            top=tuple(self._vocabulary.scored(other, value) for other, value in row.top),
        )

    def _advance(self, sequence: Sequence, token: int, row: TokenLogprobs | None) -> StepOutput:
        """Append a token; end the sequence if it is the last."""
        answer = self._answers[sequence]
        sampling = sequence.request.sampling
        sequence.tokens.append(token)
        ended = token in self._eos_tokens and not sampling.ignore_eos
        text = "" if ended else answer.detokenizer.push(token)
        stopped = ended or answer.detokenizer.stopped
        finished = stopped or len(sequence.tokens) == sequence.max_length
        if finished:
            text += answer.detokenizer.finish()
            stopped = ended or answer.detokenizer.stopped
            self.remove(sequence)
        queue_seconds, answer.queue_seconds = answer.queue_seconds, None
        return StepOutput(
            token_ids=(token,),
            text=text,
            logprobs=() if row is None else (row,),
            finish_reason=None if not finished else "stop" if stopped else "length",
            queue_seconds=queue_seconds,
        )
