"""`POST /v1/chat/completions` generates the assistant's next turn, steered as the request asks."""

import time
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
from server.api.messages import ASSISTANT, characters
from server.api.parsing import UNSUPPORTED, read_request
from server.engine.base import Engine
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
        exchange.record_prompts((message["role"], message["content"]) for message in chat.messages)
        grammar = await exchange.read_grammar()
        room = context.engine.max_model_len - len(prompt)
        limit = context.settings.default_max_tokens
        plans = [
            ChoicePlan(
                prompt,
                chat.sampling(index, grammar, room, limit),
                ChatChoice(index, chat.listing(prompt, chat.alternatives)),
            )
            for index in range(chat.n)
        ]
        try:
            return await exchange.answer(plans, len(prompt))
        except InvalidRequestError as error:
            raise _with_chat_field_names(error, chat) from error


def _check(chat: ChatRequest) -> None:
    if (field := chat.unsupported) is not None:
        message = f"This server does not support '{field}', unless they must not be called."
        raise invalid(message, field, UNSUPPORTED)
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


async def _read_messages(chat: ChatRequest, engine: Engine, exchange: Exchange) -> tuple[int, ...]:
    tokenize = partial(engine.prompts.tokenize_chat, chat.conversation)
    tokens = await exchange.read_prompt(characters(chat.messages), tokenize)
    answer = chat.max_completion_tokens or chat.max_tokens or 1
    return tuple(chat.truncated(tokens, engine.max_model_len - answer))


def _with_chat_field_names(error: InvalidRequestError, chat: ChatRequest) -> InvalidRequestError:
    """Rename the field in the engine's refusal to the one that a chat request has instead."""
    names = {"prompt": "messages", "max_tokens": chat.limit_field}
    return InvalidRequestError(str(error), names.get(error.param, error.param), error.code)
