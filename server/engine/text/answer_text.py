"""Turns the tokens of an answer into outputs with text, and finds where the answer ends."""

from dataclasses import replace

from server.engine.output import FinishReason, StepOutput, TokenLogprobs
from server.engine.request import Request, SamplingSettings
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.vocabulary import Vocabulary


def end_tokens(sampling: SamplingSettings, eos_tokens: frozenset[int]) -> frozenset[int]:
    """Return the tokens that end an answer; `eos_tokens` are those of the model."""
    own = frozenset[int]() if sampling.ignore_eos else eos_tokens
    return own.union(sampling.stop_token_ids)


class AnswerText:
    """Makes an output of each token of one answer: its text, and the reason for the answer's end.

    An answer ends at one of `end_tokens`, at a stop string, where its grammar is complete, or at
    its last token.
    """

    def __init__(
        self, request: Request, vocabulary: Vocabulary, eos_tokens: frozenset[int]
    ) -> None:
        sampling = request.sampling
        self._detokenizer = Detokenizer(
            vocabulary,
            sampling.stop,
            request.prompt,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
            shown_special=sampling.shown_special,
        )
        self._end_tokens = end_tokens(sampling, eos_tokens)
        self._min_tokens = sampling.min_tokens if sampling.grammar is None else 0
        self._length = 0

    def append(
        self,
        token: int,
        logprobs: TokenLogprobs | None,
        *,
        is_last: bool,
        is_complete: bool = False,
    ) -> StepOutput:
        """Return the output of the answer's next token.

        Args:
            logprobs: the token's, if they were asked for; their offset is set here.
            is_last: the answer has as many tokens as it may have.
            is_complete: its grammar allows no more.
        """
        self._length += 1
        may_stop = self._length > self._min_tokens
        is_end = may_stop and token in self._end_tokens
        text = self._detokenizer.push(token, ends=is_end, may_stop=may_stop)
        if logprobs is not None:
            logprobs = replace(logprobs, offset=self._detokenizer.offset)
        reason: FinishReason | None = None
        ends = is_end or is_complete or self._detokenizer.stopped
        if ends or is_last:
            text += self._detokenizer.finish()
            reason = "stop" if ends else "length"
        scored = () if logprobs is None else (logprobs,)
        return StepOutput((token,), text, scored, finish_reason=reason)
