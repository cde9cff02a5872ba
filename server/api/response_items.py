"""The output of `/v1/responses`: items (messages, reasoning, calls), and the events of a stream."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, Listing
from server.api.message_parts import AnswerReader, MessageReading, call_id
from server.api.token_bodies import scored_token
from server.engine.chat import ToolCall
from server.engine.output import FinishReason, StepOutput

Event: TypeAlias = dict[str, JsonValue]


@dataclass(slots=True)
class _OpenItem:
    """A message or a piece of reasoning that still grows. It has one part of text."""

    kind: str  # message or reasoning
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[JsonValue] = field(default_factory=list)

    @property
    def part(self) -> dict[str, JsonValue]:
        """The part of text, as far as it has come."""
        text = "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs: JsonValue = list(self.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def body(self, status: str, content: Sequence[JsonValue]) -> dict[str, JsonValue]:
        """Return the item with its content."""
        common: dict[str, JsonValue] = {"id": self.id, "type": self.kind, "status": status}
        own: dict[str, JsonValue] = {"role": "assistant"}
        if self.kind == "reasoning":
            own = {"summary": [], "encrypted_content": None}
        return {**common, **own, "content": list(content)}


@dataclass(slots=True)
class ResponseChoice:
    """Implements server.api.frames.Choice, which documents the methods."""

    index: int
    listing: Listing
    reading: MessageReading
    _reader: AnswerReader = field(init=False)
    _items: list[JsonValue] = field(default_factory=list)  # those that are complete
    _open: _OpenItem | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _waiting: list[JsonValue] = field(default_factory=list)  # log-probabilities of text to come
    _token_ids: list[int] = field(default_factory=list)
    _unread: int = 0  # tokens whose text no part has yet
    _reasoning_tokens: int = 0
    _of_prompt: dict[str, JsonValue] | None = None  # None before the first output
    _finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._reader = AnswerReader(self.reading)

    def empty_copy(self) -> "ResponseChoice":
        return ResponseChoice(self.index, self.listing, self.reading)

    def shared(self) -> Mapping[str, JsonValue]:
        shared, self._of_prompt = self._of_prompt or {}, {}
        return shared

    def add(self, output: StepOutput) -> None:
        self._advance(output)

    def body(self) -> dict[str, JsonValue]:
        cut_off = self._finish_reason == "length"
        return {
            "output": list(self._items),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            **self.listing.of_answer(self._token_ids),
        }

    def deltas(self, output: StepOutput) -> Sequence[Event]:
        events = self._advance(output)
        if output.finish_reason is not None:
            events.append({"type": "finished", "response": self.body()})
        return events

    def _advance(self, output: StepOutput) -> list[Event]:
        if self._of_prompt is None:
            self._of_prompt = self.listing.of_prompt(output.prompt_logprobs)
        self._token_ids += output.token_ids
        self._unread += len(output.token_ids)
        self._waiting += [scored_token(token, self.listing) for token in self._quoted.take(output)]
        events: list[Event] = []
        for part in self._reader.read(output):
            if part.content:
                events += self._grow("message", part.content)
            if part.reasoning:
                self._waiting.clear()  # a text lists its own tokens
                events += self._grow("reasoning", part.reasoning)
                self._reasoning_tokens += self._unread
            if part.call is not None:
                self._waiting.clear()
                events += [*self._close(), *self._call(part.call)]
            self._unread = 0
        if (reason := output.finish_reason) is not None:
            self._finish_reason = reason
            if not self._items and self._open is None:
                events += self._begin("message")
            events += self._close("incomplete" if reason == "length" else "completed")
        return events

    def _grow(self, kind: str, text: str) -> list[Event]:
        """Append text to the open item, or to a new one if that is of another kind."""
        events: list[Event] = []
        if self._open is None or self._open.kind != kind:
            events = [*self._close(), *self._begin(kind)]
        assert self._open is not None
        self._open.texts.append(text)
        if kind == "reasoning":
            return [*events, self._of_part("response.reasoning_text.delta", delta=text)]
        logprobs, self._waiting = self._waiting, []
        self._open.logprobs += logprobs
        delta = self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)
        return [*events, delta]

    def _begin(self, kind: str) -> list[Event]:
        prefix = "msg" if kind == "message" else "rs"
        self._open = item = _OpenItem(kind, f"{prefix}_{secrets.token_hex(12)}")
        return [
            self._of_item("response.output_item.added", item.body("in_progress", [])),
            self._of_part("response.content_part.added", part=item.part),
        ]

    def _close(self, status: str = "completed") -> list[Event]:
        item = self._open
        if item is None:
            return []
        if item.kind == "message":
            item.logprobs += self._waiting
            self._waiting = []
        part: dict[str, Any] = item.part
        done = {name: part[name] for name in ("text", "logprobs") if name in part}
        kind = str(part["type"])
        events = [
            self._of_part(f"response.{kind}.done", **done),
            self._of_part("response.content_part.done", part=part),
            self._of_item("response.output_item.done", item.body(status, [part])),
        ]
        self._items.append(item.body(status, [part]))
        self._open = None
        return events

    def _call(self, call: ToolCall) -> list[Event]:
        item: dict[str, JsonValue] = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "completed",
            "call_id": call_id(),
            "name": call.name,
            "arguments": call.arguments,
        }
        begun = {**item, "status": "in_progress", "arguments": ""}
        place: dict[str, JsonValue] = {"item_id": item["id"], "output_index": len(self._items)}
        arguments = "response.function_call_arguments"
        events: list[Event] = [
            self._of_item("response.output_item.added", begun),
            {"type": f"{arguments}.delta", **place, "delta": call.arguments},
            {"type": f"{arguments}.done", **place, "name": call.name, "arguments": call.arguments},
            self._of_item("response.output_item.done", item),
        ]
        self._items.append(item)
        return events

    def _of_item(self, kind: str, item: dict[str, JsonValue]) -> Event:
        return {"type": kind, "output_index": len(self._items), "item": item}

    def _of_part(self, kind: str, **fields: JsonValue) -> Event:
        assert self._open is not None
        place: dict[str, JsonValue] = {
            "item_id": self._open.id,
            "output_index": len(self._items),
            "content_index": 0,
        }
        return {"type": kind, **place, **fields}
