"""`POST /v1/chat/completions` generates the assistant's next turn, steered as the request asks."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import ChoicePlan, Exchange, answering, check_request
from server.api.chat_choices import ChatChoice
from server.api.chat_schemas import ChatRequest
from server.api.context import Context
from server.api.documentation import json_body
from server.api.errors import invalid
from server.api.frames import Wording
from server.api.message_parts import MessageReading
from server.api.messages import ASSISTANT, characters, shown_text
from server.api.parsing import UNSUPPORTED, read_request
from server.api.structure import Structure
from server.api.tools import call_structure
from server.engine.base import Engine
from server.engine.chat import AnswerFormat, ChatPrompt
from server.engine.errors import InvalidRequestError

WORDING: Final = Wording("chat", "chatcmpl", "chat.completion", "chat.completion.chunk")

router = APIRouter()


@router.post(
    "/chat/completions",
    summary="Continue a conversation",
    openapi_extra=json_body(
        ChatRequest,
        {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 16,
        },
    ),
)
async def create_chat_completion(request: Request, context: Context) -> Response:
    """Answer a conversation, as JSON or as a stream of server-sent events.

    The answer is a new turn of the assistant, as with OpenAI, even where the last message is
    the assistant's own. With `continue_final_message` it continues that message.
    """
    arrived = time.perf_counter()
    chat = await read_request(ChatRequest, request)
    check_request(chat, 1, context)
    _check(chat)
    async with answering(request, context, chat, WORDING, arrived) as exchange:
        prompt = await _read_messages(chat, context.engine, exchange)
        exchange.record_prompts(
            (str(message["role"]), shown_text(message)) for message in chat.messages
        )
        grammar = await exchange.read_grammar(_structure_of(chat, prompt.answer))
        room = context.engine.max_model_len - len(prompt.tokens)
        limit = context.settings.default_max_tokens
        use = chat.tool_use
        reading = MessageReading(prompt.answer, use.several, use.named)
        marks = frozenset() if prompt.answer is None else prompt.answer.shown_special
        plans = [
            ChoicePlan(
                tuple(prompt.tokens),
                replace(chat.sampling(index, grammar, room, limit), shown_special=marks),
                ChatChoice(index, chat.listing(prompt.tokens, chat.alternatives), reading),
            )
            for index in range(chat.n)
        ]
        try:
            return await exchange.answer(plans, len(prompt.tokens))
        except InvalidRequestError as error:
            raise _with_chat_field_names(error, chat) from error


def _check(chat: ChatRequest) -> None:
    if chat.functions and chat.function_call is None:
        raise invalid(
            "This server supports 'tools' instead of 'functions'.", "functions", UNSUPPORTED
        )
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid(
            "'max_tokens' and 'max_completion_tokens' are two names of one limit, and differ.",
            "max_tokens",
        )
    if chat.continue_final_message:
        if chat.add_generation_prompt:
            raise invalid(
                "'continue_final_message' continues a message, and 'add_generation_prompt' begins "
                "one; only one of them may be true.",
                "continue_final_message",
            )
        if chat.messages[-1]["role"] != ASSISTANT:
            raise invalid(
                "'continue_final_message' needs a last message of the assistant.",
                "continue_final_message",
            )
    if chat.top_logprobs and not chat.logprobs:
        raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")


async def _read_messages(chat: ChatRequest, engine: Engine, exchange: Exchange) -> ChatPrompt:
    read = partial(engine.prompts.read_chat, chat.conversation)
    prompt = await exchange.read_prompt(characters(chat.messages), read)
    answer = chat.max_completion_tokens or chat.max_tokens or 1
    return replace(prompt, tokens=chat.truncated(prompt.tokens, engine.max_model_len - answer))


def _structure_of(
    chat: ChatRequest, answer: AnswerFormat | None
) -> Callable[[], Structure | None] | None:
    """Return a function that makes the structure of the answer; None if the answer is free."""
    use = chat.tool_use
    if not (chat.is_structured or use.forced or use.strict_field):
        return None

    def structure() -> Structure | None:
        given = chat.structure()
        if not use.tools or answer is None:
            return given
        if use.forced and (part := answer.begins_inside) is not None:
            message = f"The prompt has begun the answer's {part}, so a call cannot be demanded."
            raise invalid(message, "tool_choice", "invalid_value")
        return call_structure(use, answer.calls, given)

    return structure


def _with_chat_field_names(error: InvalidRequestError, chat: ChatRequest) -> InvalidRequestError:
    """Rename the field in the engine's refusal to the one that a chat request has instead."""
    names = {"prompt": "messages", "max_tokens": chat.limit_field}
    return InvalidRequestError(str(error), names.get(error.param, error.param), error.code)
