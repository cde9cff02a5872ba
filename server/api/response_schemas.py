"""The fields of `POST /v1/responses`: their checks, and the conversation that they ask for."""

from typing import Annotated, ClassVar, Final, Literal, TypeAlias

from pydantic import AfterValidator, FailFast, Field, JsonValue, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.conversation_fields import ConversationFields
from server.api.fields import MAX_LOGPROBS, TOKENS, StreamOptions
from server.api.parsing import UNSUPPORTED
from server.api.request_shapes import InputShape
from server.api.response_input import parse_input, with_instructions
from server.api.strict import Strict, only_neutral
from server.api.structure import TextFormat
from server.api.tools import (
    MAX_TOOLS,
    FlatChoice,
    FunctionDefinition,
    ToolUse,
    check_tools,
    tool_use,
)
from server.engine.chat import Conversation, Message

_LOGPROBS: Final = "message.output_text.logprobs"


class ResponseTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]
    defer_loading: Annotated[bool, only_neutral("defer_loading", False)] = False
    output_schema: Annotated[object, only_neutral("output_schema")] = None

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, fields: object) -> object:
        """Refuse tools of OpenAI's own before their other fields are looked at."""
        if isinstance(fields, dict) and fields.get("type") not in (None, "function"):
            message = "This server supports tools of the type 'function' only."
            raise PydanticCustomError(UNSUPPORTED, message)
        return fields

    @property
    def echo(self) -> dict[str, JsonValue]:
        """The tool as the answer repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }


ResponseTools: TypeAlias = Annotated[
    list[ResponseTool], Field(max_length=MAX_TOOLS), FailFast(), AfterValidator(check_tools)
]


# A conversation that comes back has the reasoning's text, so it needs no encrypted form of it.
Include: TypeAlias = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
Includes: TypeAlias = Annotated[list[Include], Field(max_length=16), FailFast()]


class TextOptions(Strict):
    """Says how the answer's text is to look."""

    format: TextFormat | None = None
    verbosity: Annotated[object, only_neutral("text.verbosity", "medium")] = None


class ReasoningOptions(Strict):
    """Says how much the model is to reason. The answer has the reasoning itself, no summary."""

    effort: str | None = None
    summary: Annotated[object, only_neutral("reasoning.summary", "auto")] = None
    generate_summary: Annotated[object, only_neutral("reasoning.generate_summary", "auto")] = None


class ResponseStreamOptions(StreamOptions):
    """Options of a stream; its last event has the token counts in any case."""

    continuous_usage_stats: Annotated[
        bool, only_neutral("stream_options.continuous_usage_stats", False)
    ] = False
    include_obfuscation: Annotated[
        bool, only_neutral("stream_options.include_obfuscation", False)
    ] = False


class ResponseRequest(ConversationFields):
    """The body of `POST /v1/responses`, which has the whole conversation: nothing is stored."""

    messages_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"

    input: Annotated[
        tuple[Message, ...], PlainValidator(parse_input, json_schema_input_type=InputShape)
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=TOKENS)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: ResponseTools = Field(default_factory=list)
    tool_choice: FlatChoice = None  # auto, if there are tools
    include: Includes = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = (
        None  # it counts calls of OpenAI's own tools
    )
    n: Annotated[int, only_neutral("n", 1)] = 1
    stream_options: ResponseStreamOptions | None = None

    background: Annotated[bool, only_neutral("background", False)] = False
    context_management: Annotated[object, only_neutral("context_management", [])] = None
    # The name of the method is that of the base class, whose conversation has another meaning.
    stored_conversation: Annotated[object, only_neutral("conversation")] = Field(
        None, alias="conversation"
    )
    previous_response_id: Annotated[object, only_neutral("previous_response_id")] = None
    prompt: Annotated[object, only_neutral("prompt")] = None
    store: Annotated[bool, only_neutral("store", False)] = False
    truncation: Annotated[object, only_neutral("truncation", "disabled")] = None

    @property
    def conversation(self) -> Conversation:
        """The instructions and the input, and how the model's template is to render them."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return Conversation(
            with_instructions(self.instructions, self.input),
            variables=self.variables(effort, "reasoning.effort"),
            tools=self.tool_use.tools,
        )

    @property
    def tool_use(self) -> ToolUse:
        """The tools that the answer may call.

        Raises:
            ApiError: `tool_choice` chooses among tools that are not there.
        """
        choice = self.tool_choice
        if not self.tools and choice is not None and choice.mode == "auto":
            choice = None  # answers repeat it, so clients send it
        return tool_use(self.tools, choice, parallel=self.parallel_tool_calls)

    @property
    def alternatives(self) -> int | None:
        """The number of alternatives of each token; None if no log-probabilities are asked for."""
        wanted = self.top_logprobs or _LOGPROBS in self.include
        return (self.top_logprobs or 0) if wanted else None

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's length."""
        return "max_output_tokens"

    @property
    def answer_limit(self) -> int | None:
        """The largest number of tokens in the answer; None if the request sets no limit."""
        return self.max_output_tokens

    @property
    def answer_format(self) -> TextFormat | None:
        """The object that says whether the answer is text or JSON."""
        return None if self.text is None else self.text.format

    @property
    def echo(self) -> dict[str, JsonValue]:
        """The fields of the request that the answer repeats, as OpenAI does."""
        choice = self.tool_choice
        text = self.answer_format
        effort = None if self.reasoning is None else self.reasoning.effort
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": dict(self.metadata or {}),
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": self.temperature,
            "text": {
                "format": {"type": "text"}
                if text is None
                else text.model_dump(by_alias=True, exclude_none=True),
                "verbosity": "medium",
            },
            "tool_choice": "auto" if choice is None else choice.flat,
            "tools": [tool.echo for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }
