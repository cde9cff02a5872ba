"""OpenAI's objects for a legacy completion: the answer, a stream's chunk, log-probabilities."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import JsonValue

from server.api.generations import Usage
from server.engine.base import FinishReason, StepOutput, TokenLogprobs

LOWEST_LOGPROB: Final = -9999.0  # JSON has no infinity; OpenAI's own stand-in


@dataclass(frozen=True, slots=True)
class Frame:
    """What the answer and every chunk of one request have in common."""

    id: str
    created: int  # Unix seconds
    model: str
    steering: Sequence[JsonValue]

    def answer(self, choices: Iterable[JsonValue], usage: Usage) -> dict[str, JsonValue]:
        """The whole answer."""
        return {
            **self._body(choices),
            "usage": dict(usage.body),
            "steering": list(self.steering),
        }

    def chunk(self, choice: dict[str, JsonValue], *, usage_follows: bool) -> dict[str, JsonValue]:
        """A stream's chunk. The one that ends a choice says what steered it."""
        chunk = self._body([choice])
        if usage_follows:
            chunk["usage"] = None
        if choice["finish_reason"] is not None:
            chunk["steering"] = list(self.steering)
        return chunk

    def _body(self, choices: Iterable[JsonValue]) -> dict[str, JsonValue]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


@dataclass(slots=True)
class Choice:
    """One choice, from the outputs that came so far."""

    index: int
    with_logprobs: bool
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _offset: int = 0  # characters of the tokens that chunks have carried

    def add(self, output: StepOutput) -> None:
        """Append what one step gave."""
        self._texts.append(output.text)
        self._logprobs.extend(output.logprobs)
        self._finish_reason = output.finish_reason

    def body(self) -> dict[str, JsonValue]:
        """The choice of a whole answer."""
        return self._choice("".join(self._texts), self._logprobs, self._finish_reason)

    def delta(self, output: StepOutput) -> dict[str, JsonValue] | None:
        """The choice of a stream's chunk; None where the step has nothing for the client."""
        if not (output.text or output.logprobs or output.finish_reason):
            return None
        return self._choice(output.text, output.logprobs, output.finish_reason)

    def _choice(
        self, text: str, logprobs: Sequence[TokenLogprobs], finish_reason: FinishReason | None
    ) -> dict[str, JsonValue]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs_body(logprobs) if self.with_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs_body(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, JsonValue]:
        offsets: list[JsonValue] = []
        for token in logprobs:
            offsets.append(self._offset)
            self._offset += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in logprobs],
            "token_logprobs": [_finite(token.chosen.logprob) for token in logprobs],
            "top_logprobs": [_alternatives(token) for token in logprobs],
            "text_offset": offsets,
        }


def _alternatives(logprobs: TokenLogprobs) -> dict[str, JsonValue]:
    """The best tokens, and the sampled one even where it is not among them, as OpenAI does."""
    alternatives: dict[str, JsonValue] = {}
    # Two ids may have equal text (incomplete bytes): the better one stands for it.
    for token in (*logprobs.top, logprobs.chosen):
        alternatives.setdefault(token.text, _finite(token.logprob))
    return alternatives


def _finite(value: float) -> float:
    return max(value, LOWEST_LOGPROB)
