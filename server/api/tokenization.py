"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them; harnesses ask for them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import FailFast, Field, PlainValidator, model_validator
from starlette.responses import JSONResponse, Response

from server.api.answering import LONG_TEXT
from server.api.auth import require_api_key
from server.api.context import Context, ServerContext
from server.api.documentation import json_body
from server.api.errors import invalid, timed_out
from server.api.fields import TOKENS
from server.api.messages import characters, parse_messages
from server.api.models import split_model
from server.api.parsing import read_request
from server.api.request_shapes import MessageShape
from server.api.strict import Strict
from server.api.waiting import unless_client_leaves
from server.engine.base import PromptReader
from server.engine.chat import Conversation, Message

T = TypeVar("T")

router = APIRouter(dependencies=[Depends(require_api_key)])


class TokenizeRequest(Strict):
    """A text, or a conversation, whose tokens are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[
        tuple[Message, ...] | None,
        PlainValidator(parse_messages, json_schema_input_type=list[MessageShape]),
    ] = None
    # A conversation's template writes the special tokens itself.
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("it takes one of 'prompt' and 'messages'")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("'add_special_tokens' is for a 'prompt'")
        return self


class DetokenizeRequest(Strict):
    """The tokens whose text is asked for."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=TOKENS)]], FailFast()]


@router.post(
    "/tokenize",
    summary="Show the tokens of a text or a conversation",
    openapi_extra=json_body(TokenizeRequest, {"model": "smollm2-135m-instruct", "prompt": "Hello"}),
)
async def tokenize(request: Request, context: Context) -> Response:
    """Answer with the token ids, their number, and the length of the context."""
    asked = await read_request(TokenizeRequest, request)
    _check_model(asked.model, context)
    prompts = context.engine.prompts
    read: Callable[[], Sequence[int]]
    if asked.messages is not None:
        conversation = Conversation(asked.messages, asked.add_generation_prompt)
        length, read = characters(conversation), partial(_chat_tokens, prompts, conversation)
    else:
        text, special = asked.prompt or "", asked.add_special_tokens is not False
        length, read = len(text), partial(prompts.tokenize, text, add_special_tokens=special)
    tokens = await _run(length, read, request, context)
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": context.engine.max_model_len,
            "tokens": tokens,
            "token_strs": prompts.names(tokens) if asked.return_token_strs else None,
        }
    )


@router.post(
    "/detokenize",
    summary="Show the text of tokens",
    openapi_extra=json_body(
        DetokenizeRequest, {"model": "smollm2-135m-instruct", "tokens": [19556]}
    ),
)
async def detokenize(request: Request, context: Context) -> Response:
    """Answer with the tokens' text, special tokens included."""
    asked = await read_request(DetokenizeRequest, request)
    _check_model(asked.model, context)
    vocabulary = context.engine.model.vocab_size
    if unknown := [token for token in asked.tokens if token >= vocabulary]:
        raise invalid(f"Token ids must be in 0..{vocabulary - 1}; {unknown[0]} is not.", "tokens")

    read = partial(context.engine.prompts.detokenize, asked.tokens)
    return JSONResponse({"prompt": await _run(len(asked.tokens), read, request, context)})


@router.get("/tokenizer_info", summary="Show the tokenizer's special tokens and chat template")
async def tokenizer_info(context: Context) -> Response:
    """Answer with what a client needs to format conversations by itself."""
    described = asdict(context.engine.prompts.tokenizer)
    return JSONResponse({"tokenizer_class": described.pop("kind"), **described})


def _chat_tokens(prompts: PromptReader, conversation: Conversation) -> Sequence[int]:
    return prompts.read_chat(conversation).tokens


def _check_model(model: str | None, context: ServerContext) -> None:
    if model is not None:
        split_model(model, context.settings.served_names)


async def _run(length: int, read: Callable[[], T], request: Request, context: ServerContext) -> T:
    """Call `read`; in a thread if the text is long, up to the request's deadline."""
    if length < LONG_TEXT:
        return read()
    seconds = context.settings.request_timeout

    async def in_thread() -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            return await loop.run_in_executor(context.prompt_threads, read)

    try:
        return await unless_client_leaves(request.receive, in_thread())
    except TimeoutError:
        raise timed_out(seconds) from None
