"""Finds the special tokens in the marks by which a model writes calls and reasoning."""

import json
import re
from collections.abc import Collection, Mapping

from server.engine.chat import CallSyntax
from server.engine.text.response_format import ResponseFormat


def marks_of(
    known: ResponseFormat, fields: Collection[str], special: Mapping[str, int]
) -> frozenset[int]:
    """Return the special tokens that mark some parts of an answer.

    Args:
        known: how the model writes answers.
        fields: the parts' names.
        special: the tokenizer's special tokens by their names.
    """
    marks = [known.marks[field] for field in fields]
    return frozenset(
        token
        for name, token in special.items()
        if any(name in text or _as_pattern(name) in text for text in marks)
    )


def call_syntax(calls: Mapping[str, str | None], special: Mapping[str, int]) -> CallSyntax:
    """Return how the model writes calls, with special tokens as ids.

    Args:
        calls: the same with texts only.
        special: the tokenizer's special tokens by their names.
    """
    separator, mark = calls["separator"], calls["mark"] or ""
    return CallSyntax(
        mark,
        special.get(mark),
        _pieces(calls["opening"] or "", special),
        None if separator is None else _pieces(separator, special),
        _pieces(calls["closing"] or "", special),
        calls["arguments"] or "",
    )


def _pieces(text: str, special: Mapping[str, int]) -> tuple[str | int, ...]:
    marks = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    parts = re.split(f"({marks})", text) if marks else [text]
    return tuple(special.get(part, part) for part in parts if part)


def _as_pattern(name: str) -> str:
    """Return a regular expression of the name, as JSON writes it in a string."""
    return json.dumps(re.escape(name), ensure_ascii=False)[1:-1]
