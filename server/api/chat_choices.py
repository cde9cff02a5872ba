"""The choices of `/v1/chat/completions`: a message, and log-probabilities token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, finite
from server.engine.base import FinishReason, ScoredToken, StepOutput, TokenLogprobs


@dataclass(slots=True)
class ChatChoice:
    """Implements server.api.frames.Choice, which documents the methods."""

    index: int
    with_logprobs: bool
    _texts: list[str] = field(default_factory=list)
    _tokens: list[TokenLogprobs] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _opened: bool = False  # True once a chunk has given the role

    def empty_copy(self) -> "ChatChoice":
        return ChatChoice(self.index, self.with_logprobs)

    def add(self, output: StepOutput) -> None:
        self._texts.append(output.text)
        self._tokens.extend(self._quoted.take(output))
        self._finish_reason = output.finish_reason

    def body(self) -> dict[str, JsonValue]:
        message: JsonValue = {
            "role": "assistant",
            "content": "".join(self._texts),
            "refusal": None,
        }
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(self._tokens) if self.with_logprobs else None,
            "finish_reason": self._finish_reason,
        }

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        deltas: list[dict[str, JsonValue]] = []
        if not self._opened:
            self._opened = True
            deltas.append(self._delta({"role": "assistant", "content": "", "refusal": None}))
        tokens = self._quoted.take(output)
        if output.text or tokens:
            deltas.append(self._delta({"content": output.text}, tokens))
        if output.finish_reason is not None:
            deltas.append(self._delta({}, finish_reason=output.finish_reason))
        return deltas

    def _delta(
        self,
        delta: JsonValue,
        tokens: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
    ) -> dict[str, JsonValue]:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens and self.with_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> JsonValue:
        return {"content": [_scored(token) for token in tokens], "refusal": None}


def _scored(token: TokenLogprobs) -> JsonValue:
    return {**_token(token.chosen), "top_logprobs": [_token(other) for other in token.top]}


def _token(token: ScoredToken) -> dict[str, JsonValue]:
    return {
        "token": token.text,
        "logprob": finite(token.logprob),
        "bytes": list(token.bytes),
    }
