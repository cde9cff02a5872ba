"""Answers conversations, alike for chats and for responses."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from starlette.responses import Response

from server.api.answering import ChoicePlan, Exchange
from server.api.call_grammar import call_structure
from server.api.context import ServerContext
from server.api.conversation_fields import ConversationFields
from server.api.errors import invalid
from server.api.frames import Choice
from server.api.logprobs import Listing
from server.api.message_parts import MessageReading
from server.api.messages import characters, shown_text
from server.api.parsing import UNSUPPORTED
from server.api.structure import Structure
from server.engine.base import Engine
from server.engine.chat import AnswerFormat, ChatPrompt
from server.engine.errors import InvalidRequestError

MakeChoice: TypeAlias = Callable[[int, Listing, MessageReading], Choice]


async def answer_conversation(
    asked: ConversationFields, exchange: Exchange, context: ServerContext, make: MakeChoice
) -> Response:
    """Answer a conversation, as JSON or as a stream.

    Args:
        asked: the request, whose fields were checked.
        exchange: produces the answer.
        context: the server's.
        make: makes a choice in the endpoint's own format.

    Raises:
        EngineError: the engine refuses a choice, or loses one before the answer begins.
        ApiError: the deadline has passed, a score that was asked for is unavailable, or the
            answer cannot have the structure that is asked for.
        ClientGoneError: the client has closed the connection.
    """
    if asked.include_stop_str_in_output and asked.tool_use.tools:
        raise invalid(
            "'include_stop_str_in_output' cannot be used with tools that may be called.",
            "include_stop_str_in_output",
            UNSUPPORTED,
        )
    try:
        prompt = await _read_messages(asked, context.engine, exchange)
        exchange.record_prompts(
            (str(message["role"]), shown_text(message)) for message in asked.conversation.messages
        )
        grammar = await exchange.read_grammar(_structure_of(asked, prompt.answer))
        room = context.engine.max_model_len - len(prompt.tokens)
        limit = context.settings.default_max_tokens
        use = asked.tool_use
        has_reasoning = not (asked.is_structured or use.forced)
        reading = MessageReading(prompt.answer, has_reasoning, use.several, use.named)
        marks = frozenset[int]() if prompt.answer is None else prompt.answer.shown_special
        plans = [
            ChoicePlan(
                tuple(prompt.tokens),
                replace(asked.sampling(index, grammar, room, limit), shown_special=marks),
                make(index, asked.listing(prompt.tokens, asked.alternatives), reading),
            )
            for index in range(asked.n)
        ]
        return await exchange.answer(plans, len(prompt.tokens))
    except InvalidRequestError as error:
        raise _with_own_field_names(error, asked) from error


async def _read_messages(
    asked: ConversationFields, engine: Engine, exchange: Exchange
) -> ChatPrompt:
    conversation = asked.conversation
    read = partial(engine.prompts.read_chat, conversation)
    prompt = await exchange.read_prompt(characters(conversation), read)
    kept = asked.truncated(prompt.tokens, engine.max_model_len - (asked.answer_limit or 1))
    return replace(prompt, tokens=kept)


def _structure_of(
    asked: ConversationFields, answer: AnswerFormat | None
) -> Callable[[], Structure | None] | None:
    """Return a function that makes the structure of the answer; None if the answer is free."""
    use = asked.tool_use
    if not (asked.is_structured or use.forced or use.strict_field):
        return None

    def structure() -> Structure | None:
        given = asked.structure()
        if not use.tools or answer is None:
            return given
        return call_structure(use, answer.calls, given)

    return structure


def _with_own_field_names(
    error: InvalidRequestError, asked: ConversationFields
) -> InvalidRequestError:
    """Rename the field in the engine's refusal to the one that the request has instead."""
    param = error.param
    if param == "max_tokens":
        param = asked.limit_field
    elif param == "prompt" or param.startswith("messages"):
        # A conversation that is given in another form has other places.
        param = param if param.startswith(asked.messages_field) else asked.messages_field
    return InvalidRequestError(str(error), param, error.code)
