"""`POST /v1/completions`: text from a prompt, steered as the request asks."""

import time
import uuid
from collections.abc import Sequence

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import JsonValue
from starlette.responses import JSONResponse, Response

from server.api.choices import Choice, Frame
from server.api.context import Context, ServerContext
from server.api.errors import ApiError, invalid
from server.api.generations import GenerationGroup, closing_on_error, unless_client_leaves
from server.api.model_names import split_model
from server.api.parsing import read_json_object, validate
from server.api.schemas import CompletionRequest, Prompt
from server.api.streaming import CompletionStream
from server.engine.base import Engine, StepOutput
from server.engine.base import Request as EngineRequest

LONG_TEXT = 10_000  # characters from which tokenizing is worth a thread

router = APIRouter()


@router.post("/completions", summary="Complete one or several prompts")
async def create_completion(request: Request, context: Context) -> Response:
    """Complete a prompt or several, as JSON or as a stream of server-sent events."""
    arrived = time.perf_counter()
    fields = await read_json_object(request)
    completion = validate(CompletionRequest, fields)
    _check(completion, context)
    _, suffix = split_model(completion.model, context.settings.served_names)
    steering = context.steering.apply(suffix, completion.steering, given="steering" in fields)
    group = GenerationGroup(context.engine, context.metrics, steering, arrived)
    async with closing_on_error(group):
        frame = Frame(f"cmpl-{uuid.uuid4().hex}", int(time.time()), completion.model, steering.echo)
        prompts = await _tokenize(completion.prompt, context.engine)
        requests = [
            EngineRequest(f"{frame.id}-{index}", prompt, completion.sampling(index), steering.edits)
            for index, prompt in enumerate(_repeat(prompts, completion.choices_per_prompt))
        ]
        with_logprobs = completion.logprobs is not None
        choices = tuple(Choice(index, with_logprobs) for index in range(len(requests)))
        prompt_tokens = sum(map(len, prompts))
        await unless_client_leaves(request.receive, group.submit(requests, prompt_tokens))
        if completion.stream:
            return CompletionStream(
                group,
                frame,
                choices,
                include_usage=completion.include_usage,
                write_timeout=context.settings.write_timeout,
            )
        body = await unless_client_leaves(request.receive, _collect(group, frame, choices))
    group.close()
    return JSONResponse(body)


async def _collect(
    group: GenerationGroup, frame: Frame, choices: Sequence[Choice]
) -> dict[str, JsonValue]:
    async def deliver(index: int, output: StepOutput) -> None:
        choices[index].add(output)

    await group.run(deliver)
    return frame.answer((choice.body() for choice in choices), group.usage)


def _check(completion: CompletionRequest, context: ServerContext) -> None:
    """What the fields say together, and what the server's state allows."""
    if not context.engine.ready:
        raise ApiError(503, "The model is not ready to serve.", code="not_ready")
    n = completion.choices_per_prompt
    if completion.best_of not in (None, n):
        raise invalid(
            f"'best_of' is {completion.best_of}: this server supports only as many as 'n' ({n}).",
            "best_of",
            "unsupported_parameter",
        )
    if completion.stream_options is not None and not completion.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    limit = context.settings.max_completions_per_request
    if len(completion.prompt) * n > limit:
        raise invalid(
            f"{len(completion.prompt)} prompts times n = {n} are more than the {limit} "
            "completions that one request may ask for.",
            "n" if len(completion.prompt) <= limit else "prompt",
            "too_many_completions",
        )


async def _tokenize(prompts: Sequence[Prompt], engine: Engine) -> list[tuple[int, ...]]:
    def tokenize() -> list[tuple[int, ...]]:
        return [
            tuple(engine.tokenize(prompt)) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return tokenize() if characters < LONG_TEXT else await to_thread.run_sync(tokenize)


def _repeat(prompts: Sequence[tuple[int, ...]], times: int) -> list[tuple[int, ...]]:
    return [prompt for prompt in prompts for _ in range(times)]
