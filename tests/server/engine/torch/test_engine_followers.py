"""Tests followers: requests whose place in the queue is reserved when their leader is admitted.

A follower is submitted later, after the leader's answer, for instance to score that answer.
"""

import asyncio
from dataclasses import replace

import pytest

from server.engine.base import (
    Edit,
    EngineError,
    QueueFullError,
    Request,
    SamplingSettings,
    StepOutput,
)
from server.engine.generation import DeliveredGeneration
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings
from tests.conftest import StartEngine
from tests.engines import idle
from tests.serving import eventually
from tests.tiny import random_maps

PROMPT = tuple(b"hello world")
# One request runs, and three may wait: two if one place is reserved for a follower.
NARROW = EngineOptions(
    kv_cache_gb=0.02, max_batch_size=1, max_waiting=3, check_invariants=True, prefix_cache=False
)
SHORT = Request("short", PROMPT, SamplingSettings(2, 0, ignore_eos=True))
LEADER = replace(SHORT, has_follower=True)
ENDLESS = Request("endless", PROMPT, SamplingSettings(400, 0, ignore_eos=True))
SCORED = Request("scored", PROMPT, SamplingSettings(0, prompt_logprobs=0, prompt_logprobs_from=9))


async def submit(engine: TorchEngine, request: Request) -> DeliveredGeneration:
    (generation,) = await engine.submit([request])
    return generation


async def finish(generation: DeliveredGeneration) -> list[StepOutput]:
    return [output async for output in generation]


async def fill(engine: TorchEngine) -> list[DeliveredGeneration]:
    """Submit endless requests until the queue is full: one runs, and the others wait."""
    endless = [await submit(engine, ENDLESS)]
    await anext(aiter(endless[0]))
    while True:
        try:
            endless.append(await submit(engine, ENDLESS))
        except QueueFullError:
            return endless


async def test_a_full_queue_does_not_refuse_a_follower(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=NARROW)
    leader = await submit(engine, LEADER)
    assert len(await finish(leader)) == 2
    endless = await fill(engine)
    assert engine.stats().waiting == 2
    follower = await leader.follow(SCORED)
    assert engine.stats().waiting == 3
    with pytest.raises(QueueFullError):
        await submit(engine, SHORT)
    for generation in endless:
        generation.cancel()
    [output] = await finish(follower)
    assert len(output.prompt_logprobs) == len(PROMPT) - 9
    await eventually(lambda: idle(engine))
    assert len(await fill(engine)) == 1 + 3, "the place is still taken"


@pytest.mark.parametrize("finished", [False, True])
async def test_who_is_cancelled_gives_the_place_up(
    start_engine: StartEngine, finished: bool
) -> None:
    engine = await start_engine({}, options=NARROW)
    leader = await submit(engine, LEADER)
    if finished:
        await finish(leader)
    leader.cancel()
    leader.cancel()
    await eventually(lambda: idle(engine))
    with pytest.raises(EngineError, match="no place"):
        await leader.follow(SCORED)
    assert len(await fill(engine)) == 1 + 3


async def test_followers_need_a_reserved_place_once(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    alone, leader = await engine.submit([SHORT, LEADER])
    with pytest.raises(EngineError, match="no place"):
        await alone.follow(SHORT)
    assert len(await finish(await leader.follow(SHORT))) == 2
    with pytest.raises(EngineError, match="no place"):
        await leader.follow(SHORT)
    await finish(leader)
    await eventually(lambda: idle(engine))


async def test_the_place_counts_when_its_leader_is_admitted(start_engine: StartEngine) -> None:
    engine = await start_engine({}, options=NARROW)
    running = await submit(engine, ENDLESS)
    await anext(aiter(running))
    waiting = await submit(engine, ENDLESS)
    with pytest.raises(QueueFullError):
        await engine.submit([LEADER, SHORT])
    assert len(await engine.submit([LEADER])) == 1
    waiting.cancel()
    running.cancel()


async def test_a_follower_that_is_refused_can_come_again(start_engine: StartEngine) -> None:
    engine = await start_engine({"a": random_maps(1)}, options=NARROW)
    leader = await submit(engine, LEADER)
    with pytest.raises(EngineError, match="Token ids"):
        await leader.follow(replace(SHORT, prompt=(-1,)))
    # The follower's intervention is loaded before its admission, as for every request.
    steered = replace(SHORT, edits=(Edit("a", AffineSettings(1.0)),))
    assert len(await finish(await leader.follow(steered))) == 2


async def test_who_stops_waiting_for_the_admission_leaves_nothing(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine({}, options=NARROW)
    leader = await submit(engine, LEADER)
    await finish(leader)
    following = asyncio.create_task(leader.follow(ENDLESS))
    await asyncio.sleep(0)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    leader.cancel()
    await eventually(lambda: idle(engine))
