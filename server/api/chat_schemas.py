"""The fields of `POST /v1/chat/completions`: their checks, and the sampling settings they give."""

from typing import Annotated, Literal, TypeAlias

from pydantic import FailFast, Field, PlainValidator

from server.api.fields import TOKENS, GenerationFields, only_neutral
from server.api.messages import Message, parse_messages
from server.api.request_shapes import MessageShape
from server.engine.base import SamplingSettings

# A list's check stops at the first fault: to collect thousands of faults takes long.
Tools: TypeAlias = Annotated[list[dict[str, object]], FailFast()]


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
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    # Tools that must not be called change nothing; `unsupported` names the others.
    tools: Tools = Field(default_factory=list)
    tool_choice: Annotated[object, only_neutral("tool_choice", "none")] = None
    functions: Tools = Field(default_factory=list)
    function_call: Annotated[object, only_neutral("function_call", "none")] = None
    response_format: Annotated[object, only_neutral("response_format", {"type": "text"})] = None
    modalities: Annotated[object, only_neutral("modalities", ["text"])] = None
    audio: Annotated[object, only_neutral("audio")] = None
    moderation: Annotated[object, only_neutral("moderation")] = None
    reasoning_effort: Annotated[object, only_neutral("reasoning_effort", "none")] = None
    store: Annotated[bool, only_neutral("store", False)] = False
    verbosity: Annotated[object, only_neutral("verbosity", "medium")] = None
    web_search_options: Annotated[object, only_neutral("web_search_options")] = None

    # OpenAI runs, bills and files a request by these fields; they do not change the answer.
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, object] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def unsupported(self) -> str | None:
        """The field that asks for tool calls, given the other fields; None if none does."""
        if self.tools and self.tool_choice is None:
            return "tools"
        return "functions" if self.functions and self.function_call is None else None

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's length."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling(self, choice: int, room: int, default: int | None) -> SamplingSettings:
        """Return the sampling settings of one choice.

        Args:
            room: tokens that the prompt leaves of the context.
            default: the limit of a request that sets none, in tokens; None for all of `room`.
        """
        limits = (self.max_completion_tokens, self.max_tokens)
        unlimited = max(room if default is None else min(room, default), 1)
        return self.settings(
            choice,
            max_tokens=next((limit for limit in limits if limit is not None), unlimited),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
