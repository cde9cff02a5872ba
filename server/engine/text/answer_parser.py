"""Divides an answer's text into content, reasoning and calls of tools, as it comes.

transformers' `ResponseParser` finds the parts. An answer is what a model has happened to write, so
a part that is not as it should be must become content, where `ResponseParser` raises an error.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
)

from server.engine.chat import AnswerPart, CallSyntax, Tool, ToolCall
from server.engine.text.response_format import CALLS, REASONING

Event: TypeAlias = dict[str, Any]

_MALFORMED: Final = "region_malformed"
# Errors of the functions that read a part's value.
_FAULTS: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class _LenientParser(ResponseParser):
    """Reports a malformed part as an event, and leaves the prompt's text out of all events.

    `ResponseParser` holds back the end of the prompt where it may be the beginning of a mark, and
    then counts it to the answer.
    """

    _prefix_length = 0
    _opened_at = 0

    def __init__(
        self,
        template: ResponseTemplate,
        prefix: str,
        tools: list[dict[Any, Any] | Callable[..., Any]],
    ) -> None:
        super().__init__(template, prefix=prefix, tools=tools)
        self._prefix_length = len(self._buffer)

    @property
    def inside(self) -> str | None:
        """The field whose mark has opened and not closed; None in between."""
        return None if self._current == self._implicit_name else self._current

    def _accumulate(self, events: list[Event], text: str) -> None:
        super()._accumulate(events, text[max(0, self._prefix_length - self._pos) :])

    def _open_explicit(self, events: list[Event], field: ResponseTemplateField, m: Any) -> None:
        self._opened_at = max(m.start(), self._prefix_length)
        super()._open_explicit(events, field, m)

    def _close_current(self, events: list[Event]) -> None:
        field, before = self._current, len(events)
        try:
            super()._close_current(events)
        except _FAULTS:
            self._reset_to_implicit()
            events.append({"type": _MALFORMED, "field": field})
        for event in events[before:]:
            event["source"] = self._buffer[self._opened_at : self._pos]


class TemplateParser:
    """Implements server.engine.chat.AnswerParser by a response template."""

    def __init__(self, parser: _LenientParser, *, tools: bool) -> None:
        """Without `tools`, what looks like a call is content."""
        self._parser = parser
        self._tools = tools

    def feed(self, text: str) -> Sequence[AnswerPart]:
        """Return the parts that are certain after more text."""
        return self._parts(self._parser.feed(text))

    def finish(self) -> Sequence[AnswerPart]:
        """Return the parts that were held back. A call that is cut off is content."""
        _, events = self._parser.finalize()
        return self._parts(events)

    def _parts(self, events: Sequence[Event]) -> list[AnswerPart]:
        return [part for event in events for part in _parts(event, tools=self._tools)]


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """Implements server.engine.chat.AnswerFormat by a response template."""

    template: ResponseTemplate
    prompt: str  # the text of the conversation that is answered
    tools: Sequence[Tool]
    shown_special: frozenset[int]
    calls: CallSyntax | None

    def begin(self) -> TemplateParser:
        """Return the parser of one answer."""
        return TemplateParser(self._parser(), tools=bool(self.tools))

    @property
    def begins_inside(self) -> str | None:
        """The part in whose middle answers begin; None if the prompt ends between two parts."""
        return self._parser().inside

    def _parser(self) -> _LenientParser:
        tools: list[dict[Any, Any] | Callable[..., Any]] = [tool.definition for tool in self.tools]
        return _LenientParser(self.template, self._prefix, tools)

    @property
    def _prefix(self) -> str:
        """The prompt from the last beginning of an answer on; none of it if there is none."""
        anchors = list(self.template.start_anchor_re.finditer(self.prompt))
        return self.prompt[anchors[-1].start() :] if anchors else ""


def _parts(event: Event, *, tools: bool) -> Iterator[AnswerPart]:
    kind, field = event["type"], event["field"]
    if kind == _MALFORMED:
        yield AnswerPart(content=event["source"])
    elif kind == "region_close" and field == CALLS:
        calls = _calls(event["value"]) if tools else None
        if calls is None:
            yield AnswerPart(content=event["source"])
        else:
            yield from (AnswerPart(call=call) for call in calls)
    elif kind == "region_chunk" and field in REASONING:
        yield AnswerPart(reasoning=event["text"])
    elif kind == "region_chunk" and field != CALLS:
        yield AnswerPart(content=event["text"])


def _calls(value: object) -> list[ToolCall] | None:
    """Return the calls in a part's value, an object or a list of them; None if one is no call."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else None
        try:
            found.append(_call(call))
        except _FAULTS:
            return None
    return found


def _call(value: Any) -> ToolCall:
    name = value["name"]
    name.encode()
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise TypeError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON writes as ASCII
        text = json.dumps(arguments, allow_nan=False)
    return ToolCall(name, text)
