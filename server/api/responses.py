"""`POST /v1/responses` answers a conversation in OpenAI's newer form; nothing is stored."""

import time
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import answering, check_request
from server.api.context import Context
from server.api.conversations import answer_conversation
from server.api.documentation import json_body
from server.api.frames import Wording
from server.api.parsing import read_request
from server.api.response_frame import ResponseFrame
from server.api.response_items import ResponseChoice
from server.api.response_schemas import ResponseRequest

router = APIRouter()


@router.post(
    "/responses",
    summary="Answer an input",
    openapi_extra=json_body(
        ResponseRequest,
        {"model": "smollm2-135m-instruct", "input": "Hello", "max_output_tokens": 16},
    ),
)
async def create_response(request: Request, context: Context) -> Response:
    """Answer a text or a conversation, as JSON or as a stream of server-sent events."""
    arrived = time.perf_counter()
    asked = await read_request(ResponseRequest, request)
    check_request(asked, 1, context)
    wording = Wording("chat", "resp", partial(ResponseFrame, asked.echo))
    async with answering(request, context, asked, wording, arrived) as exchange:
        return await answer_conversation(asked, exchange, context, ResponseChoice)
