"""The choices of `/v1/chat/completions`: a message, and log-probabilities token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, Listing
from server.api.message_parts import MessageParts, MessageReading
from server.api.token_bodies import scored_token
from server.engine.output import StepOutput, TokenLogprobs


@dataclass(slots=True)
class ChatChoice:
    """Implements server.api.frames.Choice, which documents the methods."""

    index: int
    listing: Listing
    reading: MessageReading
    _parts: MessageParts = field(init=False)
    _tokens: list[TokenLogprobs] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _of_prompt: dict[str, JsonValue] | None = None  # None before the first output
    _finish_reason: str | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _opened: bool = False  # True once a chunk has given the role

    def __post_init__(self) -> None:
        self._parts = MessageParts(self.reading)

    def empty_copy(self) -> "ChatChoice":
        return ChatChoice(self.index, self.listing, self.reading)

    def shared(self) -> Mapping[str, JsonValue]:
        shared, self._of_prompt = self._of_prompt or {}, {}
        return shared

    def add(self, output: StepOutput) -> None:
        self._read_prompt(output)
        self._parts.add(output)
        self._token_ids += output.token_ids
        self._tokens.extend(self._quoted.take(output))
        self._finish_reason = self._parts.finish_reason(output)

    def body(self) -> dict[str, JsonValue]:
        return {
            "index": self.index,
            "message": self._parts.message(),
            "logprobs": None if self.listing.logprobs is None else self._logprobs(self._tokens),
            "finish_reason": self._finish_reason,
            **self.listing.of_answer(self._token_ids),
        }

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        self._read_prompt(output)
        contents = self._parts.add(output)
        tokens = self._quoted.take(output)
        of_answer = self.listing.of_answer(output.token_ids) if output.token_ids else {}
        if not contents and (tokens or of_answer):
            contents = [{} if self.reading.format else {"content": ""}]
        deltas: list[dict[str, JsonValue]] = []
        ends = output.finish_reason is not None
        if ends and self.reading.format and self._parts.empty:
            contents = [{"content": ""}]
        if not self._opened:
            self._opened = True
            # An answer that is parsed may turn out to have no content.
            opening = None if self.reading.format else ""
            deltas.append(self._delta({"role": "assistant", "content": opening, "refusal": None}))
        for content in contents:
            deltas.append(self._delta(content, tokens) | of_answer)
            tokens, of_answer = [], {}
        if ends:
            deltas.append(self._delta({}, finish_reason=self._parts.finish_reason(output)))
        return deltas

    def _delta(
        self,
        delta: JsonValue,
        tokens: Sequence[TokenLogprobs] = (),
        finish_reason: str | None = None,
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
        return {"content": [scored_token(token, self.listing) for token in tokens], "refusal": None}
