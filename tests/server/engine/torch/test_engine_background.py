"""Tests background requests: they use free room only, and end when other requests need it."""

import asyncio
from dataclasses import replace

import pytest

from server.engine.base import Generation, NoBackgroundRoomError, Request, StepOutput
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from tests.conftest import StartEngine
from tests.engines import idle
from tests.serving import eventually
from tests.steered import GREEDY, PROMPTS, generate, tokens_of

LONG = replace(GREEDY, max_tokens=150)
BLOCK = 16 * 256  # bytes of the keys and values of 16 tokens of the tiny Llama
OPTIONS = EngineOptions(
    kv_cache_gb=48 * BLOCK / 1e9, max_batch_size=4, max_batch_tokens=32, check_invariants=True
)


async def submit(engine: TorchEngine, prompt: bytes = PROMPTS[0]) -> Generation:
    (generation,) = await engine.submit([Request("test", tuple(prompt), LONG, background=True)])
    return generation


async def read(generation: Generation) -> list[StepOutput]:
    return [output async for output in generation]


async def test_it_gives_what_a_request_gives(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=OPTIONS)
    expected = tokens_of(await generate(engine, PROMPTS[0], sampling=LONG))
    background = await submit(engine)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    beside = generate(engine, PROMPTS[3], sampling=LONG)
    found, _ = await asyncio.gather(read(background), beside)
    assert tokens_of(found) == expected
    await eventually(lambda: idle(engine))


async def test_it_is_ended_for_a_request_that_wants_its_place(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=OPTIONS)
    background = [await submit(engine) for _ in range(3)]
    answers = [generate(engine, PROMPTS[0], sampling=LONG) for _ in range(4)]
    results = await asyncio.gather(
        *(read(each) for each in background), *answers, return_exceptions=True
    )
    assert all(isinstance(result, NoBackgroundRoomError) for result in results[:3])
    assert all(isinstance(result, list) for result in results[3:])
    assert engine.stats().preemptions == 0
    await eventually(lambda: idle(engine))


async def test_it_is_ended_for_a_request_that_grows(start_engine: StartEngine) -> None:
    # The memory suffices for two sequences to begin, but for only one to reach its end.
    options = replace(OPTIONS, kv_cache_gb=15 * BLOCK / 1e9)
    engine = await start_engine({}, options=options)
    background = await submit(engine)
    grown, gave_way = await asyncio.gather(
        generate(engine, PROMPTS[0], sampling=LONG), read(background), return_exceptions=True
    )
    assert isinstance(gave_way, NoBackgroundRoomError)
    assert isinstance(grown, list)
    assert len(tokens_of(grown)) == LONG.max_tokens
    assert engine.stats().preemptions == 0


async def test_it_is_not_begun_without_room(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=OPTIONS)
    requests = [Request("test", tuple(PROMPTS[0]), LONG) for _ in range(4)]
    generations = await engine.submit(requests)
    with pytest.raises(NoBackgroundRoomError):
        await submit(engine)
    await asyncio.gather(*map(read, generations))
    assert len(tokens_of(await read(await submit(engine)))) == LONG.max_tokens


async def test_background_admission_takes_no_queue_place(start_engine: StartEngine) -> None:
    """A background request that is being admitted does not count against the queue's bound."""
    engine = await start_engine({}, options=replace(OPTIONS, max_waiting=1))
    short = replace(GREEDY, max_tokens=1)
    for _ in range(20):
        background = asyncio.create_task(submit(engine))
        await asyncio.sleep(0)  # lets the background request's admission begin
        assert len(await generate(engine, PROMPTS[0], sampling=short)) == 1
        (await background).cancel()


async def test_cancelling_frees_background_work(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=OPTIONS)
    background = await submit(engine)
    background.cancel()
    await eventually(lambda: idle(engine))
