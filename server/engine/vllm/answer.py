"""Turns what vLLM returns for a request into the engine protocol's outputs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from server.engine.base import (
    EngineError,
    FinishReason,
    InvalidRequestError,
    Request,
    StepFailedError,
    StepOutput,
    TokenLogprobs,
)
from server.engine.torch.text.detokenizer import Detokenizer
from server.engine.torch.text.vocabulary import Vocabulary


class Answer:
    """Makes a request's outputs of the token ids and log-probabilities that vLLM returns."""

    def __init__(
        self, request: Request, vocabulary: Vocabulary, eos_tokens: frozenset[int]
    ) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._eos_tokens = frozenset() if request.sampling.ignore_eos else eos_tokens
        self._detokenizer = Detokenizer(vocabulary, request.sampling.stop, request.prompt)
        self._first = True
        self.finished = False  # nothing more will be made; vLLM may still have to be told

    def read(self, output: Any) -> Iterator[StepOutput]:
        """Yield one output for each token of vLLM's `RequestOutput`, until a stop string.

        Raises:
            EngineError: the request has failed.
        """
        if output.metrics is not None and output.metrics.is_corrupted:
            raise self._not_a_number()
        completion = output.outputs[0]
        if completion.finish_reason not in (None, "stop", "length"):
            raise StepFailedError("the engine failed while computing this request")
        if self._request.sampling.max_tokens == 0:
            yield self._only_output(output)
            return
        scores = self._scores(completion.logprobs, self._request.sampling.logprobs)
        for place, token in enumerate(completion.token_ids):
            ends = output.finished and place == len(completion.token_ids) - 1
            step = self._next(token, next(scores, None), ends)
            yield self._with_prompt(step, output)
            if self.finished:
                return

    def _next(self, token: int, logprobs: TokenLogprobs | None, ends: bool) -> StepOutput:
        is_end = token in self._eos_tokens
        text = self._detokenizer.push(token, ends=is_end)
        if logprobs is not None:
            logprobs = replace(logprobs, offset=self._detokenizer.offset)
        scored = () if logprobs is None else (logprobs,)
        self.finished = ends or is_end or self._detokenizer.stopped
        reason: FinishReason | None = None
        if self.finished:
            text += self._detokenizer.finish()
            reason = "stop" if is_end or self._detokenizer.stopped else "length"
        return StepOutput((token,), text, scored, finish_reason=reason)

    def _only_output(self, output: Any) -> StepOutput:
        """Return the only output of a request without a completion; vLLM has drawn a token."""
        self.finished = True
        return self._with_prompt(StepOutput((), "", finish_reason="length"), output)

    def _with_prompt(self, step: StepOutput, output: Any) -> StepOutput:
        """Add what the first output says of the prompt, and of the wait."""
        if not self._first:
            return step
        self._first = False
        sampling, stats = self._request.sampling, output.metrics
        prompt = self._scores(output.prompt_logprobs, sampling.prompt_logprobs)
        return replace(
            step,
            prompt_logprobs=tuple(prompt)[sampling.prompt_logprobs_from - 1 :],
            queue_seconds=None if stats is None else stats.scheduled_ts - stats.queued_ts,
            cached_tokens=output.num_cached_tokens or 0,
        )

    def _scores(self, flat: Any, alternatives: int | None) -> Iterator[TokenLogprobs]:
        """Yield the log-probabilities in vLLM's `FlatLogprobs`, position by position.

        A position has the token itself, then the likeliest ones. The first of a prompt has nothing.
        """
        if flat is None or alternatives is None:
            return
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            if start == end:
                continue
            found = list(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))
            token, logprob = found[0]
            if math.isnan(logprob):
                raise self._not_a_number()
            yield self._vocabulary.logprobs(token, logprob, found[1 : 1 + alternatives])

    def _not_a_number(self) -> EngineError:
        if not self._request.effective_edits:
            return StepFailedError("the model's output is not a number")
        return InvalidRequestError(
            "Steered like this, the model's output is not a number; choose weaker settings.",
            "steering",
            "steering_overflow",
        )
