"""Tests steered engines against the oracle, alone and in mixed batches, and for equal bits.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits.
"""

import asyncio
from dataclasses import replace

import pytest
from torch import Tensor

from server.engine.request import Edit
from server.engine.torch.build import build_core
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.batch import Batch
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import TINY_OPTIONS, LoadTiny, StartEngine
from tests.steered import (
    NEW_TOKENS,
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    generate,
    interventions_of,
    logprobs_of,
    tokens_of,
)
from tests.stepped import finish, sequence
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
async def test_each_stack_alone_equals_the_oracle(start_engine: StartEngine, family: str) -> None:
    engine = await start_engine(interventions_of(family), family, EngineOptions(kv_cache_gb=0.01))
    seen = set()
    for edits in STACKS.values():
        outputs = await generate(engine, PROMPTS[0], edits)
        assert_equal_to_oracle(outputs, family, PROMPTS[0], edits)
        seen.add(tuple(tokens_of(outputs)))
    assert len(seen) >= len(STACKS) - 2, "the interventions of this test do nothing"


@pytest.mark.parametrize("family", FAMILIES)
async def test_any_mix_in_one_batch_equals_the_oracle(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The requests differ in length, arrive at different times, and are prefilled in chunks."""
    options = EngineOptions(kv_cache_gb=0.02, max_batch_size=19, max_batch_tokens=19)
    engine = await start_engine(interventions_of(family), family, options)
    batches: list[int] = []
    run = engine._core._runner.run

    def counting(batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        batches.append(len(batch.spans))
        return run(batch, bank, meter)

    monkeypatch.setattr(engine._core._runner, "run", counting)
    cases = [
        (PROMPTS[number % len(PROMPTS)], edits) for number, edits in enumerate(STACKS.values())
    ]
    mixed = await asyncio.gather(
        *(
            generate(engine, prompt, edits, delay=0.003 * number)
            for number, (prompt, edits) in enumerate(cases)
        )
    )
    assert max(batches) > 4, "no two requests shared a step"
    for outputs, (prompt, edits) in zip(mixed, cases, strict=True):
        assert_equal_to_oracle(outputs, family, prompt, edits)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("a", AffineSettings(0.0)),
        Edit("a", AffineSettings(0.0, "generated")),
        Edit("r", RewardSettings(eta=0.0, iterations=5, direction_scale=0.0)),
        Edit("r", RewardSettings(eta=0.5, iterations=0, direction_scale=0.0)),
    ],
    ids=str,
)
async def test_settings_that_do_nothing_give_the_bits_of_an_engine_with_nothing_loaded(
    start_engine: StartEngine, edit: Edit
) -> None:
    bare = await start_engine({})
    base = [await generate(bare, PROMPTS[0]) for _ in range(2)]  # the second by the prefix cache
    engine = await start_engine(interventions_of())
    await generate(engine, PROMPTS[1], STACKS["four"])  # installs the hooks
    await generate(engine, PROMPTS[1], STACKS["a"])
    assert logprobs_of(await generate(engine, PROMPTS[0], (edit,))) == logprobs_of(base[0])
    assert logprobs_of(await generate(engine, PROMPTS[0])) == logprobs_of(base[1])
    assert logprobs_of(await generate(engine, PROMPTS[0], (edit,))) == logprobs_of(base[1])


@pytest.mark.parametrize("mine", ["base", "a", "r"])
def test_a_row_keeps_its_bits_whatever_its_neighbours_ask_for(
    load_tiny: LoadTiny, mine: str
) -> None:
    """The batches have equal shapes. The number of a head's rows is a shape too, so neighbours of a
    row with a head use another head.
    """
    core = build_core(load_tiny(), replace(TINY_OPTIONS, prefix_cache=False))

    def logprobs_beside(neighbours: tuple[Edit, ...]) -> list[float]:
        batch = [sequence(PROMPTS[0], each) for each in (neighbours, STACKS[mine], neighbours)]
        return logprobs_of(finish(core, batch)[1])

    beside_base = logprobs_beside(())
    assert len(beside_base) == NEW_TOKENS
    for name in ("a", "b then a", "a support", "wide", "a on what is generated"):
        assert logprobs_beside(STACKS[name]) == beside_base, name


async def test_what_a_head_needs_is_made_before_the_engine_thread_has_it(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(interventions_of())
    given: list[object] = []
    put = Bank.put

    def spy(self: Bank, slot: int, parameters: Parameters) -> None:
        given.append(parameters)
        put(self, slot, parameters)

    monkeypatch.setattr(Bank, "put", spy)
    await generate(engine, PROMPTS[0], STACKS["r"])
    [head] = [each for each in given if isinstance(each, RewardHead)]
    assert head.prepared is not None
    assert engine._core.interventions.bank.prepare(head, head.w1.device) is head
