"""`POST /v1/chat/completions` generates the assistant's next turn, steered as the request asks."""

import time
from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import answering, check_request
from server.api.chat_choices import ChatChoice
from server.api.chat_schemas import ChatRequest
from server.api.context import Context
from server.api.conversations import answer_conversation
from server.api.documentation import json_body
from server.api.errors import invalid
from server.api.frames import ChunkFrame, Wording
from server.api.messages import ASSISTANT
from server.api.parsing import UNSUPPORTED, read_request

WORDING: Final = Wording(
    "chat", "chatcmpl", partial(ChunkFrame, "chat.completion", "chat.completion.chunk")
)

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
        return await answer_conversation(chat, exchange, context, ChatChoice)


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
        if chat.messages[-1]["role"] != ASSISTANT or "tool_calls" in chat.messages[-1]:
            raise invalid(
                "'continue_final_message' needs a last message of the assistant, without calls.",
                "continue_final_message",
            )
    if chat.top_logprobs and not chat.logprobs:
        raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
