"""`POST /v1/completions` generates text from a prompt, steered as the request asks."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Final, TypeAlias

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import ChoicePlan, Exchange, answering, check_request
from server.api.choices import CompletionChoice
from server.api.context import Context, ServerContext
from server.api.documentation import json_body
from server.api.errors import invalid
from server.api.frames import ChunkFrame, Wording
from server.api.parsing import read_request
from server.api.schemas import CompletionRequest, Prompt
from server.engine.base import Engine
from server.engine.output import PromptDescription

WORDING: Final = Wording(
    "text_completion", "cmpl", partial(ChunkFrame, "text_completion", "text_completion")
)
TOKEN_WORK: Final = 20  # to describe one token takes as long as to tokenize this many characters

ReadPrompt: TypeAlias = tuple[tuple[int, ...], PromptDescription | None]
"""A prompt's tokens, and the prompt to repeat, if the request asks for that."""

router = APIRouter()


@router.post(
    "/completions",
    summary="Complete one or several prompts",
    openapi_extra=json_body(
        CompletionRequest,
        {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 16},
    ),
)
async def create_completion(request: Request, context: Context) -> Response:
    """Complete a prompt or several, as JSON or as a stream of server-sent events."""
    arrived = time.perf_counter()
    completion = await read_request(CompletionRequest, request)
    check_request(completion, len(completion.prompt), context)
    _check(completion)
    async with answering(request, context, completion, WORDING, arrived) as exchange:
        prompts = await _read_prompts(completion, context, exchange)
        grammar = await exchange.read_grammar(
            completion.structure if completion.is_structured else None
        )
        repeated = [prompt for prompt in prompts for _ in range(completion.n)]
        plans = [
            ChoicePlan(
                tokens,
                completion.sampling(index, grammar),
                CompletionChoice(index, completion.listing(tokens, completion.logprobs), echo),
            )
            for index, (tokens, echo) in enumerate(repeated)
        ]
        return await exchange.answer(plans, sum(len(tokens) for tokens, _ in prompts))


def _check(completion: CompletionRequest) -> None:
    if completion.best_of not in (None, completion.n):
        raise invalid(
            f"'best_of' is {completion.best_of}: this server supports only as many as 'n' "
            f"({completion.n}).",
            "best_of",
            "unsupported_parameter",
        )
    if completion.max_tokens == 0 and not (
        completion.echo or completion.prompt_logprobs is not None
    ):
        raise invalid(
            "Invalid value for 'max_tokens': 0 is only allowed with 'echo' or 'prompt_logprobs'.",
            "max_tokens",
            "invalid_value",
        )


async def _read_prompts(
    completion: CompletionRequest, context: ServerContext, exchange: Exchange
) -> list[ReadPrompt]:
    engine = context.engine

    def read() -> list[ReadPrompt]:
        exchange.record_prompts(("user", _text(prompt, engine)) for prompt in completion.prompt)
        return [_read(prompt, engine, completion) for prompt in completion.prompt]

    as_text = completion.echo or context.settings.log_content
    work = sum(_work(prompt, as_text=as_text) for prompt in completion.prompt)
    return await exchange.read_prompt(work, read)


def _work(prompt: Prompt, *, as_text: bool) -> int:
    """Estimate the work of reading a prompt, in characters of text to tokenize."""
    if isinstance(prompt, str):
        return len(prompt)
    return TOKEN_WORK * len(prompt) if as_text else 0


def _read(prompt: Prompt, engine: Engine, completion: CompletionRequest) -> ReadPrompt:
    prompts = engine.prompts
    echo = prompts.describe_prompt(prompt) if completion.echo else None
    if echo is not None:
        tokens: Sequence[int] = echo.tokens
    else:
        tokens = prompts.tokenize(prompt) if isinstance(prompt, str) else prompt
    kept = completion.truncated(tokens, engine.max_model_len - completion.max_tokens)
    if echo is not None and len(kept) < len(tokens):
        echo = prompts.describe_prompt(kept)
    return tuple(kept), echo


def _text(prompt: Prompt, engine: Engine) -> str:
    return prompt if isinstance(prompt, str) else engine.prompts.detokenize(prompt)
