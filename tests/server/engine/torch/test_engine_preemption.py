"""Tests what memory bounds, and that a preempted sequence that is cancelled frees everything.

When KV memory is short, the youngest sequence gives up its blocks and waits.
"""

import asyncio
from dataclasses import replace

import pytest

from server.engine.errors import InvalidRequestError
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import StartEngine
from tests.steered import (
    PROMPTS,
    generate,
    interventions_of,
    tokens_of,
)

BLOCK = 16 * 256  # bytes of the keys and values of 16 tokens of the tiny Llama
TIGHT = EngineOptions(
    kv_cache_gb=20 * BLOCK / 1e9,  # six of the sequences below can start, and three can end
    max_batch_size=13,
    max_batch_tokens=13,
    check_invariants=True,
)


async def test_the_longest_request_that_fits_is_served_and_a_longer_one_refused_at_once(
    start_engine: StartEngine,
) -> None:
    ten_blocks = replace(TIGHT, kv_cache_gb=10 * BLOCK / 1e9)
    engine = await start_engine(interventions_of(), options=ten_blocks)
    assert engine.max_model_len == 160
    longest = SamplingSettings(150, temperature=0, ignore_eos=True)
    both = await asyncio.gather(
        *(generate(engine, b"0123456789", sampling=longest) for _ in range(2))
    )
    assert [len(tokens_of(outputs)) for outputs in both] == [150, 150]
    assert tokens_of(both[0]) == tokens_of(both[1])
    too_long = Request("test", tuple(b"0123456789a"), longest)
    with pytest.raises(InvalidRequestError, match="maximum context length is 160") as refused:
        await engine.submit([too_long])
    assert refused.value.param == "max_tokens"
    assert engine.stats().waiting == 0


async def test_a_cancelled_request_that_had_yielded_frees_everything(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine(interventions_of(), options=TIGHT)
    edits = (Edit("a", AffineSettings(1.0)), Edit("r", RewardSettings(0.5, 1)))
    sampling = SamplingSettings(100, temperature=0, ignore_eos=True)
    request = Request("test", tuple(PROMPTS[0]), sampling, edits)
    generations = await engine.submit([request] * 6)
    first = aiter(generations[0])
    for _ in range(80):
        await anext(first)
    assert engine.stats().waiting > 0, "nobody has yielded"
    for generation in reversed(generations):
        generation.cancel()
    await asyncio.wrap_future(engine._thread.call(engine._core.check))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)
    assert engine._core.interventions.slots._pins.total() == 0
