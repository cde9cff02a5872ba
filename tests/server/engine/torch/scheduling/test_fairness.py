"""Tests the scheduler's fairness: decodes never wait, and short prompts pass long ones.

A step's budget of tokens goes to decodes first. While some sequences decode, prompts get only the
`prefill` budget.
"""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.build import build_core
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.scheduler import Chunk, Scheduler
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.scheduling.shares import share_tokens
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.schedules import step

STACKS: tuple[tuple[Edit, ...], ...] = (
    (Edit("a", AffineSettings(1.0)),),
    (Edit("r", RewardSettings(0.5, 5)),),
    (Edit("a", AffineSettings(0.5, "generated")), Edit("b", AffineSettings(0.3))),
)


def sequence(prompt: int, max_tokens: int = 50, *edits: Edit) -> Sequence:
    return Sequence.of(Request("x", (0,) * prompt, SamplingSettings(max_tokens), edits))


def scheduler(*sequences: Sequence, prefill: int | None = 32, budget: int = 128) -> Scheduler:
    made = Scheduler(BlockPool(10_000, 16), 64, budget, 256, prefill)
    for each in sequences:
        made.add(each)
    return made


def counts(chunks: list[Chunk]) -> dict[Sequence, int]:
    return {chunk.sequence: chunk.count for chunk in chunks}


def test_prompts_take_little_of_a_step_that_decodes_and_all_of_one_that_does_not() -> None:
    first, long = sequence(10), sequence(1000)
    schedule = scheduler(long)
    assert counts(step(schedule)) == {long: 128}
    schedule.add(first)
    assert counts(step(schedule)) == {long: 118, first: 10}
    for _ in range(5):
        assert counts(step(schedule)) == {first: 1, long: 32}
    schedule.remove(first)
    assert counts(step(schedule)) == {long: 128}


def test_a_decode_has_its_token_in_every_step_however_many_prompts_come() -> None:
    decoding = [sequence(3, 40) for _ in range(5)]
    schedule = scheduler(*decoding)
    step(schedule)
    for _ in range(30):
        schedule.add(sequence(500))
        chunks = step(schedule)
        assert all(counts(chunks)[each] == 1 for each in decoding)
        # A chunk of one token may be a prompt's last, so only longer ones are counted as prefill.
        assert sum(chunk.count for chunk in chunks if chunk.count > 1) <= 32


def test_a_short_prompt_gets_past_long_ones() -> None:
    long = [sequence(2000) for _ in range(4)]
    schedule = scheduler(sequence(1, 1000), *long)
    step(schedule)
    short = sequence(30)
    schedule.add(short)
    step(schedule)
    step(schedule)
    assert len(short.tokens) == 31, "its first token did not come in the second step"


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    long = sequence(1600)
    schedule = scheduler(sequence(1, 1000), long)
    steps = 0
    while len(long.tokens) == 1600:
        schedule.add(sequence(30, 1))
        schedule.add(sequence(30, 1))
        assert counts(step(schedule))[long] >= 16
        steps += 1
    assert steps <= 100


@given(left=st.lists(st.integers(1, 300), max_size=12), budget=st.integers(1, 200))
@hypothesis_settings(max_examples=300)
def test_shares_use_up_the_budget_and_the_oldest_has_half(left: list[int], budget: int) -> None:
    found = share_tokens(left, budget)
    used = sum(found)
    assert all(0 <= count <= most for count, most in zip(found, left, strict=True))
    assert used <= budget
    if left:
        assert found[0] >= min(left[0], max(budget // 2, 1))
    unserved = [place for place, count in enumerate(found) if count < left[place]]
    assert not unserved or used == budget, "somebody waits for tokens that nobody takes"
    for place in unserved[1:]:
        longer = [other for other in range(1, len(left)) if left[other] > left[place]]
        assert not any(found[other] for other in longer), "a longer prompt went before"


@given(data=st.data(), sizes=st.lists(st.integers(1, 200), min_size=1, max_size=10))
@hypothesis_settings(max_examples=100)
def test_steered_and_unsteered_requests_wait_alike(data: st.DataObject, sizes: list[int]) -> None:
    """The scheduler's plans do not depend on which requests are steered, and how."""
    steered = data.draw(st.lists(st.sampled_from(((), *STACKS)), min_size=10, max_size=10))

    def plans(stacks: list[tuple[Edit, ...]]) -> list[list[tuple[int, int, int]]]:
        # The memory is small, so that some sequences are preempted.
        schedule = Scheduler(BlockPool(20, 16), 8, 48, 256, prefill_tokens=20)
        for size, edits in zip(sizes, stacks, strict=False):
            schedule.add(sequence(size, 60, *edits))
        found = []
        while schedule.running or schedule.waiting:
            found.append([(c.sequence.arrival, c.start, c.count) for c in step(schedule)])
        return found

    assert plans(steered) == plans([()] * 10)


def test_every_prompt_must_be_able_to_take_its_turn() -> None:
    with pytest.raises(ValueError, match=r"prefill_tokens \(0\) must be at least 1"):
        scheduler(prefill=0)


def test_the_device_tells_how_much_of_a_step_is_for_prompts_unless_the_operator_does(
    load_tiny: LoadTiny,
) -> None:
    def told(options: EngineOptions) -> int | None:
        return build_core(load_tiny(), options).scheduler.prefill_tokens

    default = told(TINY_OPTIONS)
    assert default is not None
    assert 1 <= default < EngineOptions().max_batch_tokens
    assert told(replace(TINY_OPTIONS, prefill_tokens=7)) == 7
