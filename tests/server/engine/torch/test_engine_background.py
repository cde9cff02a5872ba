"""Tests that background work is ended where a request needs its memory."""

import asyncio
from dataclasses import replace

from server.engine.errors import NoBackgroundRoomError
from server.engine.generation import DeliveredGeneration
from server.engine.output import StepOutput
from server.engine.request import Request
from server.engine.torch.options import EngineOptions
from tests.conftest import StartEngine
from tests.steered import GREEDY, PROMPTS, generate, tokens_of

LONG = replace(GREEDY, max_tokens=150)
BLOCK = 16 * 256  # bytes of the keys and values of 16 tokens of the tiny Llama
# The memory suffices for two sequences to begin, but for only one to reach its end.
OPTIONS = EngineOptions(
    kv_cache_gb=15 * BLOCK / 1e9, max_batch_size=4, max_batch_tokens=32, check_invariants=True
)


async def read(generation: DeliveredGeneration) -> list[StepOutput]:
    return [output async for output in generation]


async def test_it_is_ended_for_a_request_that_grows(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=OPTIONS)
    [background] = await engine.submit([Request("test", tuple(PROMPTS[0]), LONG, background=True)])
    grown, gave_way = await asyncio.gather(
        generate(engine, PROMPTS[0], sampling=LONG), read(background), return_exceptions=True
    )
    assert isinstance(gave_way, NoBackgroundRoomError)
    assert isinstance(grown, list)
    assert len(tokens_of(grown)) == LONG.max_tokens
    assert engine.stats().preemptions == 0
