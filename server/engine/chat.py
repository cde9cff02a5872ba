"""Defines conversations, the tools that a model may call in them, and how answers are parsed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

# A message has the `role` and `content` that templates expect; some have a `name`, a
# `reasoning_content`, `tool_calls`, whose arguments are objects, or a `tool_call_id`.
Message: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TemplateVariable:
    """A variable that a request sets for the chat template."""

    name: str
    value: object
    field: str  # the request's field that sets it; errors name it
    is_required: bool = True  # refused where the template does not read it, and else left out


@dataclass(frozen=True, slots=True)
class Tool:
    """A function of the client's that the model may call."""

    name: str
    description: str | None
    parameters: Mapping[str, object]  # a JSON schema of the call's arguments
    strict: bool  # calls obey the schema even if nothing forces them
    field: str  # the request's field that defines it; errors name it

    @property
    def definition(self) -> dict[str, object]:
        """The tool in OpenAI's form, which chat templates expect."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters)
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a chat, and how the template renders them."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True  # the text ends where the assistant's answer begins
    continue_final_message: bool = False  # the text ends with the last message, to be continued
    variables: tuple[TemplateVariable, ...] = ()
    tools: tuple[Tool, ...] = ()  # the model may call them


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model has written."""

    name: str
    arguments: str  # the text of a JSON object


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A piece of an answer: of its text or of its reasoning, or a whole call of a tool."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class AnswerParser(Protocol):
    """Divides the text of one answer into parts, as the text comes."""

    def feed(self, text: str) -> Sequence[AnswerPart]:
        """Return the parts that are certain after more text."""

    def finish(self) -> Sequence[AnswerPart]:
        """Return the parts that were held back. A call that is cut off is content."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Says how a model writes calls of tools.

    Each piece is a sequence of texts and of ids of special tokens. The calls of an answer are
    `{"name": ..., "arguments": ...}`, with `mark` and `opening` before them.
    """

    mark: str  # by it, calls are told from text; empty if a call is a whole answer
    mark_token: int | None  # the special token that is the mark; None if it is ordinary text
    opening: tuple[str | int, ...]
    separator: tuple[str | int, ...] | None  # between two calls; None if an answer has one at most
    closing: tuple[str | int, ...]
    arguments: str  # the key of the arguments in the call's object


class AnswerFormat(Protocol):
    """Knows how the model writes answers to one conversation."""

    @property
    def shown_special(self) -> frozenset[int]:
        """The special tokens that an answer's text must have, so that it can be parsed."""

    @property
    def calls(self) -> CallSyntax | None:
        """How the model writes calls; None if that is not known."""

    def begin(self, *, reasoning: bool = True) -> AnswerParser:
        """Return the parser of one answer.

        Args:
            reasoning: false if the answer has no reasoning, because it must have a structure.
        """


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as token ids, and how the answer to it is parsed."""

    tokens: Sequence[int]
    answer: AnswerFormat | None = None  # None if an answer is nothing but text
