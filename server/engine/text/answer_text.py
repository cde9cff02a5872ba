"""Turns the tokens of an answer into outputs with text, and finds where the answer ends."""

from dataclasses import replace

from server.engine.base import FinishReason, Request, StepOutput, TokenLogprobs
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.vocabulary import Vocabulary


class AnswerText:
    """Makes an output of each token of one answer: its text, and the reason for the answer's end.

    An answer ends at an end token, unless `ignore_eos` is set, at a stop string, or at its last
    token.
    """

    def __init__(
        self, request: Request, vocabulary: Vocabulary, eos_tokens: frozenset[int]
    ) -> None:
        sampling = request.sampling
        self._detokenizer = Detokenizer(vocabulary, sampling.stop, request.prompt)
        self._eos_tokens = frozenset() if sampling.ignore_eos else eos_tokens

    def append(self, token: int, logprobs: TokenLogprobs | None, *, is_last: bool) -> StepOutput:
        """Return the output of the answer's next token.

        Args:
            logprobs: the token's, if they were asked for; their offset is set here.
            is_last: the answer has as many tokens as it may have.
        """
        is_end = token in self._eos_tokens
        text = self._detokenizer.push(token, ends=is_end)
        if logprobs is not None:
            logprobs = replace(logprobs, offset=self._detokenizer.offset)
        reason: FinishReason | None = None
        if is_end or self._detokenizer.stopped or is_last:
            text += self._detokenizer.finish()
            reason = "stop" if is_end or self._detokenizer.stopped else "length"
        scored = () if logprobs is None else (logprobs,)
        return StepOutput((token,), text, scored, finish_reason=reason)
