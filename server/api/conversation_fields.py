"""The fields that requests for chats and for responses share, and what both say of an answer."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field

from server.api.errors import invalid
from server.api.fields import GenerationFields
from server.api.strict import only_neutral
from server.api.structure import Structure
from server.api.tools import ToolUse
from server.engine.chat import Conversation, TemplateVariable
from server.engine.grammar import CompiledGrammar
from server.engine.request import SamplingSettings


class RequestedFormat(Protocol):
    """The object by which a request says that its answer is text, or JSON."""

    @property
    def is_text(self) -> bool:
        """True if the answer is free."""

    def to_structure(self, field: str) -> Structure | None:
        """Return the structure, None for text. `field` is this object's place in the request.

        Raises:
            ApiError: the schema is too large.
        """


class ConversationFields(GenerationFields, ABC):
    """The body of a request that continues a conversation.

    OpenAI's fields that this server does not implement are accepted if they cannot change the
    answer, and otherwise only with values that ask for nothing.
    """

    messages_field: ClassVar[str]  # the field that has the conversation; errors name it
    format_field: ClassVar[str]  # the field that has `answer_format`

    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)  # vLLM's field
    parallel_tool_calls: bool = True
    moderation: Annotated[object, only_neutral("moderation")] = None

    # OpenAI runs, bills and files a request by these fields; they do not change the answer.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    @abstractmethod
    def conversation(self) -> Conversation:
        """The messages, and how the model's template is to render them."""

    @property
    @abstractmethod
    def tool_use(self) -> ToolUse:
        """The tools that the answer may call.

        Raises:
            ApiError: `tool_choice` chooses among tools that are not there.
        """

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """The number of alternatives of each token; None if no log-probabilities are asked for."""

    @property
    @abstractmethod
    def limit_field(self) -> str:
        """The field that limits the answer's length."""

    @property
    @abstractmethod
    def answer_limit(self) -> int | None:
        """The largest number of tokens in the answer; None if the request sets no limit."""

    @property
    @abstractmethod
    def answer_format(self) -> RequestedFormat | None:
        """The object that says whether the answer is text or JSON."""

    def variables(self, effort: str | None, field: str) -> tuple[TemplateVariable, ...]:
        """Return the variables that the request sets for the chat template.

        Args:
            effort: how much the model is to reason.
            field: the request's field that says so.
        """
        given = [
            TemplateVariable(name, value, f"chat_template_kwargs.{name}")
            for name, value in self.chat_template_kwargs.items()
        ]
        if effort is not None:
            # A template that knows no effort gives none.
            required = effort != "none"
            given.append(TemplateVariable("reasoning_effort", effort, field, is_required=required))
        return tuple(given)

    @property
    def is_structured(self) -> bool:
        """True if the request says which structure its answer must have."""
        given = self.answer_format
        return super().is_structured or (given is not None and not given.is_text)

    def structure(self) -> Structure | None:
        """Return the structure that the answer must have, None if it is free.

        Raises:
            ApiError: two are given, or what is asked for is too large, or is no structure.
        """
        structure = super().structure()
        if self.answer_format is None:
            return structure
        formatted = self.answer_format.to_structure(self.format_field)
        if structure is not None and formatted is not None:
            raise invalid(
                f"'{self.format_field}' and 'structured_outputs' both say how the answer must "
                "look.",
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
        unlimited = max(room if default is None else min(room, default), 1)
        return self.settings(
            choice,
            grammar,
            max_tokens=unlimited if self.answer_limit is None else self.answer_limit,
            logprobs=self.alternatives,
        )
