"""Divides an answer's text into content, reasoning and calls of tools, as it comes.

transformers' `ResponseParser` finds the parts. An answer is what a model has happened to write, so
a part that is not as it should be must become content, where `ResponseParser` raises an error.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
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
    """Reports a malformed part as an event, and text outside of all parts as content."""

    def __init__(
        self,
        template: ResponseTemplate,
        inside: str | None,
        tools: list[dict[Any, Any] | Callable[..., Any]],
    ) -> None:
        """Begin an answer in the middle of the part `inside`; None for between two parts."""
        super().__init__(template, prefix="", tools=tools)
        self._opened_at = 0
        if inside is not None:
            self._current, self._opened = inside, True

    def _accumulate(self, events: list[Event], text: str) -> None:
        if self._current is None:
            events.append({"type": "region_chunk", "field": "content", "text": text})
        else:
            super()._accumulate(events, text)

    def _open_explicit(self, events: list[Event], field: ResponseTemplateField, m: Any) -> None:
        self._opened_at = m.start()
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

    def __init__(self, parser: _LenientParser) -> None:
        self._parser = parser

    def feed(self, text: str) -> Sequence[AnswerPart]:
        """Return the parts that are certain after more text."""
        return [part for event in self._parser.feed(text) for part in _parts(event)]

    def finish(self) -> Sequence[AnswerPart]:
        """Return the parts that were held back. A call that is cut off is content."""
        _, events = self._parser.finalize()
        return [part for event in events for part in _parts(event)]


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """Implements server.engine.chat.AnswerFormat by a response template."""

    template: ResponseTemplate  # with calls only if there are tools
    inside: str | None  # the part in whose middle the prompt ends, such as the model's reasoning
    tools: Sequence[Tool]
    shown_special: frozenset[int]
    calls: CallSyntax | None

    def begin(self, *, reasoning: bool = True) -> TemplateParser:
        """Return the parser of one answer; see `AnswerFormat.begin`."""
        template, inside = self.template, self.inside
        if not reasoning:
            template, inside = without_fields(template, REASONING), None
        tools: list[dict[Any, Any] | Callable[..., Any]] = [tool.definition for tool in self.tools]
        return TemplateParser(_LenientParser(template, inside, tools))


def part_at_end(template: ResponseTemplate, prompt: str) -> str | None:
    """Return the part of an answer's reasoning in whose middle a prompt ends; None if in none."""
    anchors = list(template.start_anchor_re.finditer(prompt))
    if not anchors:
        return None
    begun = anchors[-1].end()
    for name, field in template.fields.items():
        if name in REASONING and field.open_re is not None and field.close_re is not None:
            opened = _last_end(field.open_re, prompt, begun)
            if opened is not None and _last_end(field.close_re, prompt, opened) is None:
                return name
    return None


def without_fields(template: ResponseTemplate, names: Collection[str]) -> ResponseTemplate:
    """Return a template that knows no such parts."""
    fields = {name: field for name, field in template.fields.items() if name not in names}
    implicit = None if template.implicit in names else template.implicit
    return replace(template, fields=fields, implicit=implicit)


def _last_end(pattern: Any, text: str, begin: int) -> int | None:
    """Return where the last match ends that begins at `begin` or after it."""
    # `\A` in a pattern means the beginning of the answer.
    matches = list(pattern.finditer(text[begin:]))
    return begin + matches[-1].end() if matches else None


def _parts(event: Event) -> Iterator[AnswerPart]:
    kind, field = event["type"], event["field"]
    if kind == _MALFORMED:
        yield AnswerPart(content=event["source"])
    elif kind == "region_close" and field == CALLS:
        calls = _calls(event["value"])
        yield from (AnswerPart(call=call) for call in calls)
        if not calls:
            yield AnswerPart(content=event["source"])
    elif kind == "region_chunk" and field in REASONING:
        yield AnswerPart(reasoning=event["text"])
    elif kind == "region_chunk" and field != CALLS:
        yield AnswerPart(content=event["text"])


def _calls(value: object) -> list[ToolCall]:
    """Return the calls in a part's value, an object or a list of them; none if one is no call."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else None
        try:
            found.append(_call(call))
        except _FAULTS:
            return []
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
