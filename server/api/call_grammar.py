"""The grammar of answers that may or must call tools, in llguidance's dialect of Lark."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Final

from llguidance import regex_to_lark
from pydantic import JsonValue

from server.api.closed_schema import closed_schema
from server.api.errors import invalid
from server.api.structure import Structure
from server.api.tools import ToolUse
from server.engine.chat import CallSyntax, Tool

MAX_FORCED_CALLS: Final = 32  # of one answer that must call tools
# Models write calls as Python's json does. A small model would fill free space with blanks.
_WHITESPACE: Final[dict[str, JsonValue]] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def call_structure(
    use: ToolUse, syntax: CallSyntax | None, structure: Structure | None
) -> Structure | None:
    """Return the structure of an answer that may call tools; None if it is free.

    Args:
        use: the tools; there is at least one.
        syntax: how the model writes calls; None if that is not known.
        structure: what the answer must have if it calls no tool.

    Raises:
        ApiError: both a call and another structure are demanded, the structure cannot be combined
            with calls, or it is not known how the model writes calls.
    """
    if structure is not None and use.forced:
        message = f"'{structure.field}' says how the answer must look, but it must be a call."
        raise invalid(message, "tool_choice", "invalid_value")
    strict = use.strict_field
    field = "tool_choice" if use.forced else structure.field if structure else strict
    if field is None:
        return None
    if syntax is None:
        message = (
            f"'{field}' cannot be used with tools: this server does not know how this model "
            "writes calls; it may be told with --response-template."
        )
        raise invalid(message, field, "unsupported_parameter")
    tools = use.forced or use.tools
    rules = [f"args_{place}: %json {_arguments(tool)}" for place, tool in enumerate(tools)]
    lines = [f"{tool.field}.parameters" for tool in tools]
    rules += _call_rules(tools, syntax, several=use.several)
    if structure is not None:
        rules += [f"start: answer | calls\nanswer: {structure.json_rule()}"]
    elif use.forced:
        rules += ["start: calls"]
    else:
        rules += _free_rules(syntax, several=use.several)
    return Structure("\n".join(rules), field, tuple(lines), of_schemas=True)


def _arguments(tool: Tool) -> str:
    """Return the schema of a tool's arguments, which are those that it declares."""
    schema = {"type": "object", **tool.parameters}
    if "$ref" not in schema:  # a reference brings its own
        schema.setdefault("properties", {})
    return json.dumps({"x-guidance": _WHITESPACE, **closed_schema(schema)}, ensure_ascii=False)


def _call_rules(tools: Sequence[Tool], syntax: CallSyntax, *, several: bool) -> Iterator[str]:
    separator, more = syntax.separator, ""
    if several and separator is not None:
        more = f" ({_literal(separator)} call){{0,{MAX_FORCED_CALLS - 1}}}"
    mark = _literal((syntax.mark,)) if syntax.mark_token is None else f"<[{syntax.mark_token}]>"
    yield f"calls: {mark} opened_calls"
    yield f"opened_calls: {_literal(syntax.opening)} call{more} {_literal(syntax.closing)}"
    yield "call: " + " | ".join(f"call_{place}" for place in range(len(tools)))
    for place, tool in enumerate(tools):
        before = f'{{"name": {json.dumps(tool.name)}, {json.dumps(syntax.arguments)}: '
        yield f'call_{place}: {_text(before)} args_{place} "}}"'


def _free_rules(syntax: CallSyntax, *, several: bool) -> Iterator[str]:
    """Yield the rules of text in which there may be calls, which obey their schemas."""
    repeated = "*" if several else "?"
    any_text = "/(?s:.*)/"
    if not syntax.mark:  # a call is a whole answer, and begins as no text does
        yield "start: calls | FREE?"
        yield r"FREE: /\s*[^{\s](?s:.*)/"
    elif syntax.mark_token is None:
        yield f"TEXT: {any_text}"
        yield f"start: (before opened_calls){repeated} TEXT"
        yield f"before[suffix={_text(syntax.mark)}]: {any_text}"
    else:  # no ordinary tokens may spell the mark
        yield f"TEXT: {any_text} & ~/(?s:.*){regex_to_lark(re.escape(syntax.mark))}(?s:.*)/"
        yield f"start: (TEXT calls){repeated} TEXT"


def _literal(pieces: Sequence[str | int]) -> str:
    written = (f"<[{piece}]>" if isinstance(piece, int) else _text(piece) for piece in pieces)
    return " ".join(written)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
