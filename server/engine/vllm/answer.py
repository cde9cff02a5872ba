"""Turns what vLLM returns for a request into the engine protocol's outputs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from server.engine.errors import StepFailedError
from server.engine.output import StepOutput, TokenLogprobs
from server.engine.overflow import not_a_number
from server.engine.request import Request
from server.engine.text.answer_text import AnswerText
from server.engine.text.vocabulary import Vocabulary


class Answer:
    """Makes a request's outputs of the token ids and log-probabilities that vLLM returns."""

    def __init__(
        self, request: Request, vocabulary: Vocabulary, eos_tokens: frozenset[int]
    ) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._text = AnswerText(request, vocabulary, eos_tokens)
        self._first = True
        self.finished = False  # nothing more will be made; vLLM may still have to be told

    def read(self, output: Any) -> Iterator[StepOutput]:
        """Yield one output for each token of vLLM's `RequestOutput`, until a stop string.

        Raises:
            EngineError: the request has failed.
        """
        if output.metrics is not None and output.metrics.is_corrupted:
            raise not_a_number(self._request)
        completion = output.outputs[0]
        if completion.finish_reason not in (None, "stop", "length"):
            raise StepFailedError("the engine failed while computing this request")
        if self._request.sampling.max_tokens == 0:
            yield self._only_output(output)
            return
        scores = self._scores(completion.logprobs, self._request.sampling.logprobs)
        for place, token in enumerate(completion.token_ids):
            is_last = output.finished and place == len(completion.token_ids) - 1
            step = self._text.append(token, next(scores, None), is_last=is_last)
            self.finished = step.finish_reason is not None
            yield self._with_prompt(step, output)
            if self.finished:
                return

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
        Where vLLM joins the outputs of several steps, because the reader was slow, a token that is
        among the likeliest is there once only, in the first place.
        """
        if flat is None or alternatives is None:
            return
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            if start == end:
                continue
            found = list(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))
            token, logprob = found[0]
            if math.isnan(logprob):
                raise not_a_number(self._request)
            best = found[1:]
            if len(best) < alternatives:
                ranks = dict(zip(found, flat.ranks[start:end], strict=True))
                best = sorted(found, key=ranks.__getitem__)
            yield self._vocabulary.logprobs(token, logprob, best[:alternatives], flat.ranks[start])
