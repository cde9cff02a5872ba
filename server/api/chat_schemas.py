"""The fields of `POST /v1/chat/completions`: their checks, and the sampling settings they give."""

from typing import Annotated, Literal, TypeAlias

from pydantic import FailFast, Field, PlainValidator

from server.api.errors import invalid
from server.api.fields import MAX_LOGPROBS, TOKENS, GenerationFields
from server.api.messages import parse_messages
from server.api.request_shapes import MessageShape
from server.api.strict import only_neutral
from server.api.structure import ResponseFormat, Structure
from server.api.tools import Choice, Tools, ToolUse, tool_use
from server.engine.chat import Conversation, Message, TemplateVariable
from server.engine.grammar import CompiledGrammar
from server.engine.request import SamplingSettings

# A list's check stops at the first fault: to collect thousands of faults takes long.
Functions: TypeAlias = Annotated[list[dict[str, object]], FailFast()]


class ChatRequest(GenerationFields):
    """The body of `POST /v1/chat/completions`.

    OpenAI's fields that this server does not implement are accepted if they cannot change the
    answer, and otherwise only with values that ask for nothing.
    """

    messages: Annotated[
        tuple[Message, ...],
        PlainValidator(parse_messages, json_schema_input_type=list[MessageShape]),
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=TOKENS)] | None = None  # the older name
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    # vLLM's fields.
    add_generation_prompt: bool | None = None  # true, unless the last message is continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)

    tools: Tools = Field(default_factory=list)
    tool_choice: Choice = None  # auto, if there are tools
    parallel_tool_calls: bool = True
    # The names that tools had before; functions that must not be called change nothing.
    functions: Functions = Field(default_factory=list)
    function_call: Annotated[object, only_neutral("function_call", "none")] = None
    modalities: Annotated[object, only_neutral("modalities", ["text"])] = None
    audio: Annotated[object, only_neutral("audio")] = None
    moderation: Annotated[object, only_neutral("moderation")] = None
    store: Annotated[bool, only_neutral("store", False)] = False
    verbosity: Annotated[object, only_neutral("verbosity", "medium")] = None
    web_search_options: Annotated[object, only_neutral("web_search_options")] = None

    # OpenAI runs, bills and files a request by these fields; they do not change the answer.
    metadata: dict[str, str] | None = None
    prediction: dict[str, object] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def tool_use(self) -> ToolUse:
        """The tools that the answer may call.

        Raises:
            ApiError: `tool_choice` chooses among tools that are not there.
        """
        return tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    @property
    def alternatives(self) -> int | None:
        """The number of alternatives of each token; None if no log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's length."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def conversation(self) -> Conversation:
        """The messages, and how the model's template is to render them."""
        variables = [
            TemplateVariable(name, value, f"chat_template_kwargs.{name}")
            for name, value in self.chat_template_kwargs.items()
        ]
        if (effort := self.reasoning_effort) is not None:
            # A template that knows no effort gives none.
            variables.append(
                TemplateVariable(
                    "reasoning_effort", effort, "reasoning_effort", is_required=effort != "none"
                )
            )
        continues = self.continue_final_message
        begins = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        tools = self.tool_use.tools
        return Conversation(self.messages, begins, continues, tuple(variables), tools)

    @property
    def is_structured(self) -> bool:
        """True if the request says which structure its answer must have."""
        given = self.response_format
        return super().is_structured or (given is not None and given.type != "text")

    def structure(self) -> Structure | None:
        """Return the structure that the answer must have, None if it is free.

        Raises:
            ApiError: two are given, or what is asked for is too large, or is no structure.
        """
        structure = super().structure()
        if self.response_format is None:
            return structure
        formatted = self.response_format.to_structure("response_format")
        if structure is not None and formatted is not None:
            raise invalid(
                "'response_format' and 'structured_outputs' both say how the answer must look.",
                "structured_outputs",
                "invalid_value",
            )
        return formatted or structure

    def sampling(
        self, choice: int, grammar: CompiledGrammar | None, room: int, default: int | None
    ) -> SamplingSettings:
        """Return the sampling settings of one choice.

        Args:
            grammar: that of the answer's structure.
            room: tokens that the prompt leaves of the context.
            default: the limit of a request that sets none, in tokens; None for all of `room`.
        """
        limits = (self.max_completion_tokens, self.max_tokens)
        unlimited = max(room if default is None else min(room, default), 1)
        return self.settings(
            choice,
            grammar,
            max_tokens=next((limit for limit in limits if limit is not None), unlimited),
            logprobs=self.alternatives,
        )
