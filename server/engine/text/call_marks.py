"""Finds the special tokens in the marks by which a model writes calls and reasoning."""

import json
import re
from collections.abc import Mapping

from server.engine.chat import CallSyntax
from server.engine.text.response_format import ResponseFormat


def marks_of(known: ResponseFormat, special: Mapping[str, int]) -> frozenset[int]:
    """Return the special tokens that mark the parts of an answer.

    Args:
        known: how the model writes answers.
        special: the tokenizer's special tokens by their names.
    """
    return frozenset(
        token
        for name, token in special.items()
        if name in known.marks or _as_pattern(name) in known.marks
    )


def call_syntax(calls: Mapping[str, str | None], special: Mapping[str, int]) -> CallSyntax:
    """Return how the model writes calls, with special tokens as ids.

    Args:
        calls: the same with texts only.
        special: the tokenizer's special tokens by their names.
    """
    separator = calls["separator"]
    return CallSyntax(
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
