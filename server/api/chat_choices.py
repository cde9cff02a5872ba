"""The choices of `/v1/chat/completions`: a message, and log-probabilities token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, Listing, finite
from server.engine.output import FinishReason, ScoredToken, StepOutput, TokenLogprobs


@dataclass(slots=True)
class ChatChoice:
    """Implements server.api.frames.Choice, which documents the methods."""

    index: int
    listing: Listing
    _texts: list[str] = field(default_factory=list)
    _tokens: list[TokenLogprobs] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _of_prompt: dict[str, JsonValue] | None = None  # None before the first output
    _finish_reason: FinishReason | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _opened: bool = False  # True once a chunk has given the role

    def empty_copy(self) -> "ChatChoice":
        return ChatChoice(self.index, self.listing)

    def shared(self) -> Mapping[str, JsonValue]:
        shared, self._of_prompt = self._of_prompt or {}, {}
        return shared

    def add(self, output: StepOutput) -> None:
        self._read_prompt(output)
        self._texts.append(output.text)
        self._token_ids += output.token_ids
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
            "logprobs": None if self.listing.logprobs is None else self._logprobs(self._tokens),
            "finish_reason": self._finish_reason,
            **self.listing.of_answer(self._token_ids),
        }

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        self._read_prompt(output)
        deltas: list[dict[str, JsonValue]] = []
        if not self._opened:
            self._opened = True
            deltas.append(self._delta({"role": "assistant", "content": "", "refusal": None}))
        tokens = self._quoted.take(output)
        of_answer = self.listing.of_answer(output.token_ids) if output.token_ids else {}
        if output.text or tokens or of_answer:
            deltas.append(self._delta({"content": output.text}, tokens) | of_answer)
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
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }

    def _read_prompt(self, output: StepOutput) -> None:
        if self._of_prompt is None:
            self._of_prompt = self.listing.of_prompt(output.prompt_logprobs)

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> JsonValue:
        return {"content": [self._scored(token) for token in tokens], "refusal": None}

    def _scored(self, token: TokenLogprobs) -> JsonValue:
        return {
            **self._token(token.chosen),
            "top_logprobs": [self._token(other) for other in token.top],
        }

    def _token(self, token: ScoredToken) -> dict[str, JsonValue]:
        return {
            "token": self.listing.name(token),
            "logprob": finite(token.logprob),
            "bytes": list(token.bytes),
        }
