"""Tests preemption: preempted sequences are recomputed, and their results do not change.

When KV memory is short, the youngest sequence gives up its blocks and waits.
"""

import asyncio
from dataclasses import replace

import pytest

from server.engine.base import Edit, InvalidRequestError, Request, SamplingSettings
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import StartEngine
from tests.steered import (
    GREEDY,
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    generate,
    interventions_of,
    preemptions,
    tokens_of,
)

NEW_TOKENS = 64
BLOCK = 16 * 256  # bytes of the keys and values of 16 tokens of the tiny Llama
TIGHT = EngineOptions(
    kv_cache_gb=20 * BLOCK / 1e9,  # six of the sequences below can start, and three can end
    max_batch_size=13,
    max_batch_tokens=13,
    check_invariants=True,
)
ROOMY = replace(TIGHT, kv_cache_gb=0.02)
CASES = [
    ((PROMPTS[0], PROMPTS[1], PROMPTS[3])[number % 3], edits)
    for number, edits in enumerate(STACKS.values())
]


async def test_results_are_the_oracles_after_preemptions(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted request's edits keep their positions, relative to its own prompt."""
    engine = await start_engine(interventions_of(), options=TIGHT)
    yielded = preemptions(engine, monkeypatch)
    sampling = replace(GREEDY, max_tokens=NEW_TOKENS)
    mixed = await asyncio.gather(
        *(generate(engine, prompt, edits, sampling=sampling) for prompt, edits in CASES)
    )
    decoding = [each for each in yielded if len(each.tokens) > each.prompt_length + 1]
    assert len(decoding) > 4, "hardly anybody had to yield"
    assert any(each.edits for each in decoding)
    for outputs, (prompt, edits) in zip(mixed, CASES, strict=True):
        assert_equal_to_oracle(outputs, "llama", prompt, edits, NEW_TOKENS)


async def test_draws_and_penalties_survive_a_preemption(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampling(seed: int) -> SamplingSettings:
        return SamplingSettings(
            NEW_TOKENS,
            temperature=1.0,
            top_p=0.9,
            repetition_penalty=1.2,
            frequency_penalty=0.5,
            seed=seed,
            ignore_eos=True,
        )

    async def all_of(options: EngineOptions) -> list[list[int]]:
        engine = await start_engine(interventions_of(), options=options)
        outputs = await asyncio.gather(
            *(
                generate(engine, prompt, edits, sampling=sampling(seed))
                for seed, (prompt, edits) in enumerate(CASES)
            )
        )
        return [tokens_of(each) for each in outputs]

    expected = await all_of(ROOMY)
    engine = await start_engine({})
    yielded = preemptions(engine, monkeypatch)
    assert await all_of(TIGHT) == expected
    assert len(yielded) > 4


@pytest.mark.parametrize("edits", [(), STACKS["a and r"], STACKS["a on the prompt"]], ids=str)
async def test_prompt_log_probabilities_are_told_once(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, edits: tuple[Edit, ...]
) -> None:
    engine = await start_engine(interventions_of(), options=TIGHT)
    yielded = preemptions(engine, monkeypatch)
    sampling = replace(GREEDY, max_tokens=NEW_TOKENS, prompt_logprobs=0)
    answers = await asyncio.gather(
        *(generate(engine, PROMPTS[0], edits, sampling=sampling) for _ in range(6))
    )
    assert yielded
    for outputs in answers:
        told = [token for output in outputs for token in output.prompt_logprobs]
        assert len(told) == len(PROMPTS[0]) - 1
        assert len(outputs[0].prompt_logprobs) == len(told), "they come with the first output"


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
