"""The objects around an answer's choices, and the events of a stream."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pydantic import JsonValue

from server.api.errors import ApiError
from server.api.fields import StreamOptions
from server.api.generations import Usage
from server.engine.output import StepOutput
from server.records import Operation

DONE: Final = b"data: [DONE]\n\n"


class Choice(Protocol):
    """One choice of an answer, in an endpoint's own format."""

    def empty_copy(self) -> "Choice":
        """Return an empty choice of the same index and format."""

    def shared(self) -> Mapping[str, JsonValue]:
        """Return fields beside the choices that tell of this choice's prompt; each of them once."""

    def add(self, output: StepOutput) -> None:
        """Append the output of one step."""

    def body(self) -> dict[str, JsonValue]:
        """Return the choice of a whole answer, from all outputs that were added."""

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        """Return the choice's parts for a stream's next events; none if the step adds nothing."""


class Frame(Protocol):
    """Puts the choices of one request into an answer, in an endpoint's own format."""

    def answer(
        self,
        choices: Sequence[dict[str, JsonValue]],
        usage: Usage,
        further: Mapping[str, JsonValue],
    ) -> dict[str, JsonValue]:
        """Return the whole answer; `further` holds fields beside its choices."""

    def part(
        self, part: dict[str, JsonValue], usage: Usage, shared: Mapping[str, JsonValue]
    ) -> bytes:
        """Return the event of a choice's part.

        Args:
            part: one of a choice's `deltas`.
            usage: the token counts so far.
            shared: fields beside the choice.
        """

    def closing(self, usage: Usage, further: Mapping[str, JsonValue]) -> bytes:
        """Return the events after the last part; `further` holds fields beside the choices."""

    def failure(self, error: ApiError) -> bytes:
        """Return the events of an error that ends the stream."""

    def usage(self, usage: Usage) -> dict[str, JsonValue]:
        """Return token counts in the endpoint's own form."""


@dataclass(frozen=True, slots=True)
class FrameHead:
    """The fields by which an answer describes itself, at every endpoint."""

    id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str  # the loaded model's, shortened
    steering: Sequence[JsonValue]
    options: StreamOptions


@dataclass(frozen=True, slots=True)
class Wording:
    """The names that an endpoint gives its operation and answers, and its format of answers."""

    operation: Operation  # OpenTelemetry's name of the operation
    id_prefix: str
    frame: Callable[[FrameHead], Frame]


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """Implements Frame for completions and chats, whose streams are chunks with choices."""

    _answer: str  # the name of the object that is an answer
    _chunk: str  # the name of the object that is a chunk
    _head: FrameHead

    def answer(
        self,
        choices: Sequence[dict[str, JsonValue]],
        usage: Usage,
        further: Mapping[str, JsonValue],
    ) -> dict[str, JsonValue]:
        body = self._body(self._answer, choices)
        return body | {"usage": usage.body} | self._ending(further)

    def part(
        self, part: dict[str, JsonValue], usage: Usage, shared: Mapping[str, JsonValue]
    ) -> bytes:
        chunk = self._body(self._chunk, [part])
        if self._head.options.continuous_usage_stats:
            chunk["usage"] = usage.body
        elif self._head.options.include_usage:
            chunk["usage"] = None
        if part["finish_reason"] is not None:  # the chunk that ends a choice says what steered it
            chunk["steering"] = list(self._head.steering)
        return event({**chunk, **shared})

    def closing(self, usage: Usage, further: Mapping[str, JsonValue]) -> bytes:
        options = self._head.options
        if not (options.include_usage or further):
            return DONE
        body = self._body(self._chunk, [])
        if options.include_usage or options.continuous_usage_stats:
            body["usage"] = usage.body
        return event(body | self._ending(further)) + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body)

    def usage(self, usage: Usage) -> dict[str, JsonValue]:
        return usage.body

    def _body(self, name: str, choices: Iterable[JsonValue]) -> dict[str, JsonValue]:
        return {
            "id": self._head.id,
            "object": name,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": f"fp_{self._head.fingerprint}",
            "choices": list(choices),
        }

    def _ending(self, further: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        return {"steering": list(self._head.steering), **further}


def event(body: Mapping[str, JsonValue], name: str | None = None) -> bytes:
    """Return a server-sent event, with a name or without."""
    # ASCII, because some clients take U+2028, U+2029 and U+0085 for ends of lines.
    text = json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    line = b"" if name is None else f"event: {name}\n".encode()
    return line + b"data: " + text.encode() + b"\n\n"
