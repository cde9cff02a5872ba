"""Tests of `GenerationGroup`: the generations of one request, its deadline and its usage."""

import asyncio
import time

import pytest

from interventions.registry import Registry
from server.api.context import ServerContext
from server.api.errors import ApiError
from server.api.generations import GenerationGroup
from server.engine.output import StepOutput
from server.engine.request import Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.records import GenerationRecord
from tests.serving import Script, ScriptedGeneration, build_app, usage

LAST = StepOutput((1,), "one", finish_reason="stop")
RECORD = GenerationRecord("text_completion", "cmpl-x", "tiny", "tiny")
REQUEST = Request("x", (1,), SamplingSettings(5))


@pytest.fixture
def context(tiny_engine: TorchEngine, registry: Registry) -> ServerContext:
    context = build_app(tiny_engine, registry).state.context
    assert isinstance(context, ServerContext)
    return context


async def group_of(
    context: ServerContext, generation: ScriptedGeneration, seconds: float
) -> GenerationGroup:
    """Return an admitted group of one scripted generation."""
    steering = context.steering.apply(None, None, given=False)
    group = GenerationGroup(
        context.engine, context.metrics, steering, time.perf_counter(), seconds, RECORD
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.engine, "submit", Script([generation]).submit)
        await group.submit([REQUEST], prompt_tokens=1)
    return group


async def nowhere(_: int, __: StepOutput) -> None:
    """Discard the output."""


async def test_the_deadline_ends_a_generation(context: ServerContext) -> None:
    generation = ScriptedGeneration(outputs=(StepOutput((1,), "one"),))
    group = await group_of(context, generation, 0.05)
    with pytest.raises(ApiError) as caught:
        await group.run(nowhere)
    error = caught.value
    assert (error.status, error.code) == (504, "request_timeout")
    assert error.body["error"]["type"] == "server_error"  # type: ignore[index,call-overload]
    assert "0.05 s" in error.message
    assert generation.cancelled


async def test_a_deadline_that_passes_with_the_last_token_loses_nothing(
    context: ServerContext,
) -> None:
    group = await group_of(context, ScriptedGeneration(outputs=(LAST,)), 0.05)

    async def deliver(_: int, __: StepOutput) -> None:
        time.sleep(0.1)  # noqa: ASYNC251 - blocks the loop past the deadline

    await group.run(deliver)
    assert group.usage.completion_tokens == 1


async def test_the_deadline_ends_what_comes_before_admission(context: ServerContext) -> None:
    steering = context.steering.apply(None, None, given=False)
    group = GenerationGroup(
        context.engine, context.metrics, steering, time.perf_counter(), 0.05, RECORD
    )
    assert await group.before_deadline(asyncio.sleep(0, "read")) == "read"
    with pytest.raises(ApiError) as caught:
        await group.before_deadline(asyncio.Event().wait())
    assert caught.value.code == "request_timeout"


async def test_a_deadline_that_passes_before_admission(context: ServerContext) -> None:
    steering = context.steering.apply(None, None, given=False)
    long_ago = time.perf_counter() - 10
    group = GenerationGroup(context.engine, context.metrics, steering, long_ago, 5, RECORD)
    with pytest.raises(ApiError) as caught:
        await group.submit([REQUEST], prompt_tokens=1)
    assert caught.value.code == "request_timeout"


async def test_a_prompt_counts_as_cached_where_it_was_for_all_of_its_choices(
    context: ServerContext,
) -> None:
    cached = (0, 16, 32, 16)
    outputs = [StepOutput((1,), "one", finish_reason="stop", cached_tokens=each) for each in cached]
    steering = context.steering.apply(None, None, given=False)
    group = GenerationGroup(
        context.engine, context.metrics, steering, time.perf_counter(), 5, RECORD
    )
    script = Script([ScriptedGeneration((output,)) for output in outputs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.engine, "submit", script.submit)
        await group.submit([REQUEST] * 4, prompt_tokens=80, n=2)
    await group.run(nowhere)
    assert group.usage.body == usage(prompt=80, completion=4, cached=16)
