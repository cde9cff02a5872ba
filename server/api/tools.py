"""The request fields that offer tools to the model and say which of them an answer calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol, TypeAlias, TypeVar

from pydantic import AfterValidator, FailFast, Field, JsonValue, PlainValidator, field_validator
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from server.api.errors import invalid
from server.api.strict import Strict
from server.engine.chat import Tool

T = TypeVar("T", bound="OffersTool")
MAX_TOOLS: Final = 128  # as many as OpenAI takes
MAX_TOOLS_SIZE: Final = 256 * 1024  # characters of JSON
_NO_ARGUMENTS: Final[dict[str, JsonValue]] = {"type": "object", "properties": {}}


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=lambda: dict(_NO_ARGUMENTS))
    strict: bool = False

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if schema.get("type", "object") != "object":
            raise ValueError("it must be the schema of an object, whose properties are arguments")
        return schema

    def to_tool(self, field: str) -> Tool:
        """Return the function as engines know it. `field` is this object's place in the request."""
        return Tool(self.name, self.description, self.parameters, self.strict, field)


class FunctionTool(Strict):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_tool(self, field: str) -> Tool:
        """Return the tool as engines know it. `field` is this object's place in the request."""
        return self.function.to_tool(f"{field}.function")


class OffersTool(Protocol):
    """An object of a request that defines a tool."""

    def to_tool(self, field: str) -> Tool:
        """Return the tool as engines know it. `field` is this object's place in the request."""


def check_tools(tools: list[T]) -> list[T]:
    """Return tools, or raise ValueError if two have one name, or they are too large together."""
    known = read_tools(tools)
    if len({tool.name for tool in known}) < len(known):
        raise ValueError("two tools have the same name")
    size = sum(len(json.dumps(tool.definition)) for tool in known)
    if size > MAX_TOOLS_SIZE:
        raise ValueError(f"it has {size:,} characters of JSON, more than {MAX_TOOLS_SIZE:,}")
    return tools


def read_tools(tools: Sequence[OffersTool]) -> tuple[Tool, ...]:
    """Return tools as engines know them."""
    return tuple(tool.to_tool(f"tools.{place}") for place, tool in enumerate(tools))


# A list's check stops at the first fault: to collect thousands of faults takes long.
Tools: TypeAlias = Annotated[
    list[FunctionTool], Field(max_length=MAX_TOOLS), FailFast(), AfterValidator(check_tools)
]


class NamedFunction(TypedDict):
    """The name of a function."""

    name: str


class NamedTool(TypedDict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class FlatNamedTool(TypedDict):
    """The same as `NamedTool` in the form that `/v1/responses` takes."""

    type: Literal["function"]
    name: str


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Says which tools an answer calls: none, any, at least one, or the one that is named."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None

    @property
    def flat(self) -> JsonValue:
        """The choice in the form that `/v1/responses` takes."""
        return self.mode if self.name is None else {"type": "function", "name": self.name}


def _parse_choice(value: object) -> ToolChoice:
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("named", name)
    raise ValueError("it is none, auto, required, or an object that names a function")


def _parse_flat_choice(value: object) -> ToolChoice:
    match value:
        case {"type": "function", "name": str(name)}:
            return ToolChoice("named", name)
        case {"type": "function"}:
            raise ValueError("it has no name of a function")
    return _parse_choice(value)


Choice: TypeAlias = Annotated[
    ToolChoice | None,
    PlainValidator(
        _parse_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool
    ),
]

FlatChoice: TypeAlias = Annotated[
    ToolChoice | None,
    PlainValidator(
        _parse_flat_choice,
        json_schema_input_type=Literal["none", "auto", "required"] | FlatNamedTool,
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
        return next((f"{tool.field}.strict" for tool in self.tools if tool.strict), None)


def tool_use(tools: Sequence[OffersTool], choice: ToolChoice | None, *, parallel: bool) -> ToolUse:
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
    known = read_tools(tools)
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
