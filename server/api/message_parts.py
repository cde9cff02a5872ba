"""Divides an answer's text into the fields of a chat message, as it comes."""

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from server.engine.chat import AnswerFormat, AnswerPart, ToolCall
from server.engine.output import StepOutput

# Mistral's templates take ids of nine letters and digits only; all other templates take any.
_ID_LENGTH: Final = 9
_ID_LETTERS: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class MessageReading:
    """Says how the answers to a request become messages."""

    format: AnswerFormat | None = None  # None if an answer is nothing but text
    has_reasoning: bool = True  # false: the answer must have a structure
    several_calls: bool = True  # false: the first call ends the message
    call_is_named: bool = False  # the client has named the function that is called


class AnswerReader:
    """Divides the text of one answer into parts, as it comes."""

    def __init__(self, reading: MessageReading) -> None:
        self._several_calls = reading.several_calls
        self._parser = None
        if reading.format is not None:
            self._parser = reading.format.begin(reasoning=reading.has_reasoning)
        self._called = False

    def read(self, output: StepOutput) -> list[AnswerPart]:
        """Return the parts that are certain after the output of one more step."""
        return [part for part in self._parts(output) if self._may_follow(part)]

    def _parts(self, output: StepOutput) -> Sequence[AnswerPart]:
        if self._parser is None:
            return [AnswerPart(output.text)] if output.text else []
        parts = self._parser.feed(output.text) if output.text else ()
        return parts if output.finish_reason is None else [*parts, *self._parser.finish()]

    def _may_follow(self, part: AnswerPart) -> bool:
        ended = self._called and not self._several_calls
        self._called |= part.call is not None
        return not ended


class MessageParts:
    """The fields of one message, from the outputs so far."""

    def __init__(self, reading: MessageReading) -> None:
        self._reading = reading
        self._reader = AnswerReader(reading)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[JsonValue] = []

    def add(self, output: StepOutput) -> list[dict[str, JsonValue]]:
        """Append the output of one step, and return what a stream's message gets by it."""
        deltas: list[dict[str, JsonValue]] = []
        for part in self._reader.read(output):
            if part.content:
                self._content.append(part.content)
                deltas.append({"content": part.content})
            if part.reasoning:
                self._reasoning.append(part.reasoning)
                deltas.append({"reasoning_content": part.reasoning})
            if part.call is not None:
                index, call = len(self._calls), _call_body(part.call)
                self._calls.append(call)
                deltas.append({"tool_calls": [{"index": index, **call}]})
        return deltas

    @property
    def empty(self) -> bool:
        """True while the message has nothing."""
        return not (self._content or self._reasoning or self._calls)

    def message(self) -> dict[str, JsonValue]:
        """Return the whole message."""
        message: dict[str, JsonValue] = {
            "role": "assistant",
            "content": "".join(self._content) if self._content or self.empty else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, output: StepOutput) -> str | None:
        """Return why the answer has ended with an output; None if it has not.

        As with OpenAI, a call that the client has named is no reason of its own.
        """
        if output.finish_reason == "stop" and self._calls and not self._reading.call_is_named:
            return "tool_calls"
        return output.finish_reason


def _call_body(call: ToolCall) -> dict[str, JsonValue]:
    function: JsonValue = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id(), "type": "function", "function": function}


def call_id() -> str:
    """Return a new id of a call."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
