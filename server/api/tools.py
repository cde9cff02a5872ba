"""The request fields that offer tools to the model, and the grammar of the calls it must make."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, FailFast, Field, JsonValue, PlainValidator
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from server.api.errors import invalid
from server.api.strict import Strict
from server.api.structure import Structure
from server.engine.chat import CallSyntax, Tool

MAX_TOOLS: Final = 128  # as many as OpenAI takes
MAX_TOOLS_SIZE: Final = 256 * 1024  # characters of JSON
MAX_FORCED_CALLS: Final = 32  # of one answer that must call tools
_COMBINING: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if"})  # they may add properties
_NO_ARGUMENTS: Final[dict[str, JsonValue]] = {"type": "object", "properties": {}}
# Models write calls as Python's json does. A small model would fill free space with blanks.
_WHITESPACE: Final[dict[str, JsonValue]] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=lambda: dict(_NO_ARGUMENTS))
    strict: bool = False


class FunctionTool(Strict):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def tool(self) -> Tool:
        """The tool as engines know it."""
        function = self.function
        return Tool(function.name, function.description, function.parameters, function.strict)


def _check_tools(tools: list[FunctionTool]) -> list[FunctionTool]:
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")
    size = sum(len(json.dumps(tool.tool.definition)) for tool in tools)
    if size > MAX_TOOLS_SIZE:
        raise ValueError(f"it has {size:,} characters of JSON, more than {MAX_TOOLS_SIZE:,}")
    return tools


# A list's check stops at the first fault: to collect thousands of faults takes long.
Tools: TypeAlias = Annotated[
    list[FunctionTool], Field(max_length=MAX_TOOLS), FailFast(), AfterValidator(_check_tools)
]


class NamedFunction(TypedDict):
    """The name of a function."""

    name: str


class NamedTool(TypedDict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer calls: none, any, at least one, or the one that is named."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def _parse_choice(value: object) -> ToolChoice:
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("named", name)
        case {"type": kind} if kind != "function":
            raise ValueError("of all objects it takes only one that names a function")
    raise ValueError("it is none, auto, required, or an object that names a function")


Choice: TypeAlias = Annotated[
    ToolChoice | None,
    PlainValidator(
        _parse_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool
    ),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that an answer may call, and those of them of which it must call one."""

    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    several: bool = True  # an answer may have more calls than one
    named: bool = False  # the client has named the tool that is called

    @property
    def strict_field(self) -> str | None:
        """The field by which a tool's calls obey its schema; None if no tool has that."""
        places = (place for place, tool in enumerate(self.tools) if tool.strict)
        place = next(places, None)
        return None if place is None else f"tools.{place}.function.strict"


def tool_use(
    tools: Sequence[FunctionTool], choice: ToolChoice | None, *, parallel: bool
) -> ToolUse:
    """Return which tools an answer may call, and which it must call.

    Raises:
        ApiError: the choice is of a tool that is not there.
    """
    if choice is not None and choice.mode == "none":
        return ToolUse()
    if not tools:
        if choice is not None:
            message = "'tool_choice' is only allowed when 'tools' are specified."
            raise invalid(message, "tool_choice", "invalid_value")
        return ToolUse()
    known = tuple(tool.tool for tool in tools)
    if choice is None or choice.mode == "auto":
        return ToolUse(known, several=parallel)
    if choice.mode == "required":
        return ToolUse(known, known, several=parallel)
    named = tuple(tool for tool in known if tool.name == choice.name)
    if not named:
        name = (choice.name or "")[:100]
        message = f"'tool_choice' names the function '{name}', which is not among the tools."
        raise invalid(message, "tool_choice", "invalid_value")
    return ToolUse(known, named, several=False, named=True)


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
    lines = [f"tools.{use.tools.index(tool)}.function.parameters" for tool in tools]
    rules += _call_rules(tools, syntax, several=use.several)
    if structure is not None:
        rules += [f"start: answer | calls\nanswer: {structure.only_rule()}"]
    elif use.forced:
        rules += ["start: calls"]
    else:
        rules += _free_rules(syntax, several=use.several)
    return Structure("\n".join(rules), field, tuple(lines))


def _arguments(tool: Tool) -> str:
    """Return the schema of a tool's arguments, which are those that it declares."""
    schema: dict[str, Any] = {"x-guidance": _WHITESPACE, **tool.parameters}
    schema.setdefault("type", "object")
    if "properties" in schema and _COMBINING.isdisjoint(schema):
        # Most schemas leave this out, and mean it: the function has no other parameters.
        schema.setdefault("additionalProperties", False)
    return json.dumps(schema, ensure_ascii=False)


def _call_rules(tools: Sequence[Tool], syntax: CallSyntax, *, several: bool) -> Iterator[str]:
    separator, more = syntax.separator, ""
    if several and separator is not None:
        more = f" ({_literal(separator)} call){{0,{MAX_FORCED_CALLS - 1}}}"
    yield f"calls: {_literal(syntax.opening)} inner_calls"
    yield f"inner_calls: call{more} {_literal(syntax.closing)}"
    yield "call: " + " | ".join(f"call_{place}" for place in range(len(tools)))
    for place, tool in enumerate(tools):
        before = f'{{"name": {json.dumps(tool.name)}, {json.dumps(syntax.arguments)}: '
        yield f'call_{place}: {_text(before)} args_{place} "}}"'


def _free_rules(syntax: CallSyntax, *, several: bool) -> Iterator[str]:
    """Yield the rules of text in which there may be calls, which obey their schemas."""
    repeated = "*" if several else "?"
    yield "TEXT: /(?s:.*)/"
    match syntax.opening:
        case ():  # a call is a whole answer, and begins as no text does
            yield "start: calls | FREE?"
            yield r"FREE: /\s*[^{\s](?s:.*)/"
        case (str(first), *others):
            yield f"start: (before {_literal(others)} inner_calls){repeated} TEXT"
            yield f"before[suffix={_text(first)}]: /(?s:.*)/"
        case _:
            yield f"start: (TEXT calls){repeated} TEXT"


def _literal(pieces: Sequence[str | int]) -> str:
    written = (f"<[{piece}]>" if isinstance(piece, int) else _text(piece) for piece in pieces)
    return " ".join(written)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
