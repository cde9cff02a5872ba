"""Makes a sequence's outputs: its draws, text and log-probabilities, from admission to its end."""

import random
import time
from dataclasses import replace

from server.engine.output import StepOutput, TokenLogprobs
from server.engine.text.answer_text import AnswerText, end_tokens
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.sampling.penalties import Penalties, changes_logits
from server.engine.torch.sampling.sampler import Draw
from server.engine.torch.scheduling.sequence import Sequence


class SequenceOutputs:
    """Keeps a sequence's state beside its tokens: random numbers, penalties, grammar, text, scores.

    A preemption does not change it.
    """

    def __init__(
        self,
        sequence: Sequence,
        vocabulary: Vocabulary,
        eos_tokens: frozenset[int],
    ) -> None:
        self._sequence = sequence
        request = sequence.request
        self._text = AnswerText(request, vocabulary, eos_tokens)
        self._end_tokens = end_tokens(request.sampling, eos_tokens)
        # None if the request changes no logits.
        self.penalties = Penalties(request) if changes_logits(request.sampling) else None
        grammar = request.sampling.grammar
        self._grammar = None if grammar is None else grammar.begin()
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
        """Return how to draw the next token, with the request's next random number.

        Raises:
            EngineError: the grammar cannot tell which tokens may come next.
        """
        sequence, sampling = self._sequence, self._sequence.request.sampling
        mask = None if self._grammar is None else self._grammar.mask()
        drawn = len(sequence.tokens) - sequence.prompt_length
        too_short = drawn < sampling.min_tokens and mask is None
        forbidden = self._end_tokens if too_short else frozenset[int]()
        return Draw(sampling, self._random.random(), self.penalties, mask, forbidden)

    def add_prompt_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Store the log-probabilities of the prompt's next token."""
        self._prompt_logprobs.append(logprobs)
        self._sequence.scored_prompt_tokens += 1

    def append_token(self, token: int, logprobs: TokenLogprobs | None) -> StepOutput:
        """Append a drawn token to the sequence. The last output returned has a finish reason."""
        sequence = self._sequence
        sequence.tokens.append(token)
        if self.penalties is not None:
            self.penalties.push(token)
        is_complete = self._grammar is not None and self._grammar.completed_by(token)
        is_last = len(sequence.tokens) == sequence.max_length
        return self._with_prompt(
            self._text.append(token, logprobs, is_last=is_last, is_complete=is_complete)
        )

    def only_output(self) -> StepOutput:
        """Return the only output of a request without a completion, whose prompt is computed."""
        return self._with_prompt(StepOutput((), "", finish_reason="length"))

    def _with_prompt(self, output: StepOutput) -> StepOutput:
        """Add what only the first output says: the prompt's scores, and how it was waited for."""
        output = replace(
            output,
            prompt_logprobs=tuple(self._prompt_logprobs),
            queue_seconds=self._queue_seconds,
            cached_tokens=self._cached_tokens,
        )
        self._prompt_logprobs.clear()
        self._queue_seconds = None
        self._cached_tokens = 0
        return output
