"""How far steering moves the next token's distribution: measured as it generates, exactly."""

import asyncio
from dataclasses import replace

import pytest

from server.engine.base import InvalidRequestError, Request, StepOutput
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from tests.conftest import StartEngine
from tests.oracles import Oracle, divergence
from tests.steered import (
    GREEDY,
    PROMPTS,
    STACKS,
    generate,
    interventions_of,
    preemptions,
    stack_of,
    tokens_of,
)
from tests.tiny import tiny_model

COMPARED = (
    "base",
    "a",
    "a on the prompt",
    "a on what is generated",
    "r",
    "r with other settings",
    "a and r",
    "four",
)


async def compared(engine: TorchEngine, prompt: bytes, name: str) -> list[StepOutput]:
    request = Request("test", tuple(prompt), GREEDY, STACKS[name], with_divergence=True)
    (generation,) = await engine.submit([request])
    return [output async for output in generation]


def assert_equal_to_oracle(
    oracle: Oracle, family: str, prompt: bytes, name: str, outputs: list[StepOutput]
) -> None:
    tokens = [*prompt, *tokens_of(outputs)]
    stack = stack_of(family, STACKS[name])
    steered = oracle.logits(tokens, len(prompt), stack)[len(prompt) - 1 : -1]
    base = oracle.logits(tokens, len(prompt))[len(prompt) - 1 : -1]
    found = [value for output in outputs for value in output.divergences]
    assert found == pytest.approx(
        [divergence(*rows) for rows in zip(steered, base, strict=True)], rel=1e-3, abs=1e-5
    )
    assert (max(found) > 1e-3) == (name != "base")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
async def test_alone_and_in_one_batch_it_equals_the_oracle(
    start_engine: StartEngine, family: str
) -> None:
    options = EngineOptions(
        kv_cache_gb=0.02, max_batch_size=16, max_batch_tokens=19, check_invariants=True
    )
    engine = await start_engine(interventions_of(family), family, options)
    oracle = Oracle(tiny_model(family))
    cases = [(PROMPTS[number % len(PROMPTS)], name) for number, name in enumerate(COMPARED)]
    plain = [generate(engine, prompt, STACKS[name], delay=0.01) for prompt, name in cases]
    together = await asyncio.gather(*(compared(engine, *case) for case in cases), *plain)
    for case, outputs, without in zip(
        cases, together[: len(cases)], together[len(cases) :], strict=True
    ):
        assert_equal_to_oracle(oracle, family, *case, outputs)
        assert tokens_of(outputs) == tokens_of(without)
        assert not any(output.divergences for output in without)


async def test_who_yielded_goes_on_with_both_lanes(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fourteen blocks: each sequence begins with four and ends with six.
    options = EngineOptions(
        kv_cache_gb=14 * 16 * 256 / 1e9,
        max_batch_size=8,
        max_batch_tokens=64,
        check_invariants=True,
    )
    engine = await start_engine(interventions_of(), options=options)
    yielded = preemptions(engine, monkeypatch)
    oracle = Oracle(tiny_model("llama"))
    names = ("a", "r", "a and r")
    for name in names:  # what is loaded already runs at once, beside the others
        await compared(engine, PROMPTS[1], name)
    assert not yielded
    answers = await asyncio.gather(*(compared(engine, PROMPTS[0], name) for name in names))
    assert yielded
    assert engine.stats().preemptions == len(yielded)
    for name, outputs in zip(names, answers, strict=True):
        assert_equal_to_oracle(oracle, "llama", PROMPTS[0], name, outputs)


async def test_what_can_never_fit_is_refused(start_engine: StartEngine) -> None:
    for options in (
        EngineOptions(kv_cache_gb=0.02, max_batch_size=1),
        EngineOptions(kv_cache_gb=0.0001),
    ):
        engine = await start_engine(interventions_of(), options=options)
        fitting = engine.max_model_len - len(PROMPTS[0])
        request = Request(
            "test",
            tuple(PROMPTS[0]),
            replace(GREEDY, max_tokens=fitting),
            STACKS["a"],
            with_divergence=True,
        )
        with pytest.raises(InvalidRequestError, match="Comparing") as refused:
            await engine.submit([request])
        assert refused.value.param == "compare"
