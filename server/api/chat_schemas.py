"""The fields of `POST /v1/chat/completions`: their checks, and the sampling settings they give."""

from typing import Annotated, ClassVar, TypeAlias

from pydantic import FailFast, Field, PlainValidator

from server.api.conversation_fields import ConversationFields
from server.api.fields import MAX_LOGPROBS, TOKENS
from server.api.messages import parse_messages
from server.api.request_shapes import MessageShape
from server.api.strict import only_neutral
from server.api.structure import ResponseFormat
from server.api.tools import Choice, Tools, ToolUse, tool_use
from server.engine.chat import Conversation, Message

# A list's check stops at the first fault: to collect thousands of faults takes long.
Functions: TypeAlias = Annotated[list[dict[str, object]], FailFast()]


class ChatRequest(ConversationFields):
    """The body of `POST /v1/chat/completions`."""

    messages_field: ClassVar[str] = "messages"
    format_field: ClassVar[str] = "response_format"

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

    tools: Tools = Field(default_factory=list)
    tool_choice: Choice = None  # auto, if there are tools
    # The names that tools had before; functions that must not be called change nothing.
    functions: Functions = Field(default_factory=list)
    function_call: Annotated[object, only_neutral("function_call", "none")] = None
    modalities: Annotated[object, only_neutral("modalities", ["text"])] = None
    audio: Annotated[object, only_neutral("audio")] = None
    store: Annotated[bool, only_neutral("store", False)] = False
    verbosity: Annotated[object, only_neutral("verbosity", "medium")] = None
    web_search_options: Annotated[object, only_neutral("web_search_options")] = None

    prediction: dict[str, object] | None = None  # it only makes OpenAI's answer faster

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
        continues = self.continue_final_message
        begins = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        variables = self.variables(self.reasoning_effort, "reasoning_effort")
        return Conversation(self.messages, begins, continues, variables, self.tool_use.tools)

    @property
    def answer_limit(self) -> int | None:
        """The largest number of tokens in the answer; None if the request sets no limit."""
        limits = (self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in limits if limit is not None), None)

    @property
    def answer_format(self) -> ResponseFormat | None:
        """The object that says whether the answer is text or JSON."""
        return self.response_format
