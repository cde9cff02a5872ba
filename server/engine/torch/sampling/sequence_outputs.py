"""Makes a sequence's outputs: its draws, text and log-probabilities, from admission to its end."""

import random
import time
from dataclasses import replace

from server.engine.base import FinishReason, StepOutput, TokenLogprobs
from server.engine.torch.sampling.penalties import Penalties, changes_logits
from server.engine.torch.sampling.sampler import Draw
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.text.detokenizer import Detokenizer
from server.engine.torch.text.vocabulary import Vocabulary


class SequenceOutputs:
    """Keeps a sequence's state beside its tokens: random numbers, penalties, text and scores.

    A preemption does not change it.
    """

    def __init__(self, sequence: Sequence, vocabulary: Vocabulary) -> None:
        self._sequence = sequence
        request = sequence.request
        self._detokenizer = Detokenizer(vocabulary, request.sampling.stop, request.prompt)
        # None if the request changes no logits.
        self.penalties = Penalties(request) if changes_logits(request.sampling) else None
        self._random = random.Random(sequence.request.sampling.seed)
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._submitted: float | None = time.monotonic()  # None once it was scheduled
        self._queue_seconds: float | None = None  # reported in the first output only
        self._cached_tokens = 0  # reported in the first output only

    def mark_started(self) -> None:
        """Record that the sequence starts to run, or starts again after a preemption.

        The tokens that count as computed at this point were found in the prefix cache.
        """
        if self._submitted is not None:
            self._queue_seconds = time.monotonic() - self._submitted
            self._cached_tokens = self._sequence.computed_tokens
            self._submitted = None

    def next_draw(self) -> Draw:
        """Return how to draw the next token, with the request's next random number."""
        return Draw(self._sequence.request.sampling, self._random.random(), self.penalties)

    def add_prompt_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Store the log-probabilities of the prompt's next token."""
        self._prompt_logprobs.append(logprobs)
        self._sequence.scored_prompt_tokens += 1

    def append_token(
        self, token: int, logprobs: TokenLogprobs | None, eos_tokens: frozenset[int]
    ) -> StepOutput:
        """Append a drawn token to the sequence. The last output returned has a finish reason."""
        sequence, sampling = self._sequence, self._sequence.request.sampling
        sequence.tokens.append(token)
        if self.penalties is not None:
            self.penalties.push(token)
        ended = token in eos_tokens and not sampling.ignore_eos
        text = self._detokenizer.push(token, ends=ended)
        if logprobs is not None:
            logprobs = replace(logprobs, offset=self._detokenizer.offset)
        reason: FinishReason | None = None
        if ended or self._detokenizer.stopped or len(sequence.tokens) == sequence.max_length:
            text += self._detokenizer.finish()
            reason = "stop" if ended or self._detokenizer.stopped else "length"
        return self._output((token,), text, logprobs, reason)

    def only_output(self) -> StepOutput:
        """Return the only output of a request without a completion, whose prompt is computed."""
        return self._output((), "", None, "length")

    def _output(
        self,
        tokens: tuple[int, ...],
        text: str,
        logprobs: TokenLogprobs | None,
        finish_reason: FinishReason | None,
    ) -> StepOutput:
        output = StepOutput(
            token_ids=tokens,
            text=text,
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=tuple(self._prompt_logprobs),
            finish_reason=finish_reason,
            queue_seconds=self._queue_seconds,
            cached_tokens=self._cached_tokens,
        )
        self._prompt_logprobs.clear()
        self._queue_seconds = None
        self._cached_tokens = 0
        return output
