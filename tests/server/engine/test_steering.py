"""Tests the promises about numbers on both engines, against the oracle and against each other.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits.
"""

import asyncio
from dataclasses import replace

import pytest

from server.engine.errors import InvalidRequestError
from server.engine.request import Edit, SamplingSettings
from steering.settings import AffineSettings, RewardSettings
from tests.both_engines import BOTH_STACKS, Subject, each_engine, each_setup, each_tight, request
from tests.prefix_traffic import contaminate, stack_of
from tests.steered import GREEDY, PROMPTS, STACKS, assert_greedy, logprobs_of, tokens_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROUNDS = 8  # two for each group of mixes
CASES = [(PROMPTS[number % len(PROMPTS)], edits) for number, edits in enumerate(STACKS.values())]
CASES = [case for case in CASES if case[1] in BOTH_STACKS.values()]


@each_engine
async def test_each_stack_alone_equals_the_oracle(subject: Subject) -> None:
    seen = set()
    for edits in BOTH_STACKS.values():
        outputs = await subject.answer(request(PROMPTS[0], edits))
        assert_greedy(outputs, subject.oracle, PROMPTS[0], stack_of(edits))
        seen.add(tuple(tokens_of(outputs)))
    assert len(seen) >= len(BOTH_STACKS) - 2, "the interventions of this test do nothing"


@each_setup
async def test_any_mix_in_one_batch_equals_the_oracle(subject: Subject) -> None:
    """The requests differ in length, arrive at different times, and are prefilled in chunks."""
    mixed = await asyncio.gather(
        *(
            subject.answer(request(prompt, edits), delay=0.003 * number)
            for number, (prompt, edits) in enumerate(CASES)
        )
    )
    for outputs, (prompt, edits) in zip(mixed, CASES, strict=True):
        assert_greedy(outputs, subject.oracle, prompt, stack_of(edits))


@each_tight
async def test_results_are_the_oracles_after_preemptions(subject: Subject) -> None:
    """A preempted request's edits keep their positions, relative to its own prompt."""
    before = subject.engine.stats().preemptions
    sampling = replace(GREEDY, max_tokens=64)
    # Each stack twice: a request whose slot is taken comes again later, so how many meet depends on
    # the machine.
    stacks = [edits for _, edits in CASES] * 2
    cases = [((PROMPTS[0], PROMPTS[3])[number % 2], edits) for number, edits in enumerate(stacks)]
    mixed = await asyncio.gather(
        *(subject.answer(request(prompt, edits, sampling)) for prompt, edits in cases)
    )
    assert subject.engine.stats().preemptions > before + 4, "hardly anybody had to yield"
    for outputs, (prompt, edits) in zip(mixed, cases, strict=True):
        assert_greedy(outputs, subject.oracle, prompt, stack_of(edits), 64)


@each_engine
async def test_base_a_b_in_one_batch_equal_each_alone(subject: Subject) -> None:
    names = ("base", "a", "b", "a at another strength", "a then b", "a and r", "r")
    cases = [(prompt, STACKS[name]) for name in names for prompt in PROMPTS]
    alone = [await subject.answer(request(*case)) for case in cases]
    together = await asyncio.gather(*(subject.answer(request(*case)) for case in cases))
    for one, other in zip(alone, together, strict=True):
        assert tokens_of(one) == tokens_of(other)
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=1e-4)


@each_setup
async def test_every_answer_is_that_of_an_empty_cache(subject: Subject) -> None:
    before = subject.engine.stats()
    await contaminate(subject, ROUNDS, seed=1)
    after = subject.engine.stats()
    looked_up = after.prefix_cache_queries - before.prefix_cache_queries
    hits = after.prefix_cache_hits - before.prefix_cache_hits
    assert hits > 0.1 * looked_up, "hardly anything was found"


@each_engine
async def test_a_reward_shares_the_base_models_blocks(subject: Subject) -> None:
    prompt = b"Once upon a time there was a reward that edits no keys and no values." * 2
    cached = [
        (await subject.answer(request(prompt, edits)))[0].cached_tokens
        for edits in (STACKS["base"], STACKS["r"], STACKS["a"], STACKS["a"])
    ]
    assert cached == [0, 128, 0, 128]


@each_engine
@pytest.mark.parametrize(
    "edit",
    [
        Edit("a", AffineSettings(0.0)),
        Edit("a", AffineSettings(0.0, "generated")),
        Edit("a", AffineSettings(1e-60)),  # a strength that is 0 in float32
        Edit("r", RewardSettings(eta=0.0, iterations=5, direction_scale=0.0)),
        Edit("r", RewardSettings(eta=0.5, iterations=0, direction_scale=0.0)),
        Edit("never stored", AffineSettings(0.0)),
    ],
    ids=str,
)
async def test_settings_that_do_nothing_give_the_base_models_bits(
    subject: Subject, edit: Edit
) -> None:
    """Nothing is loaded for them either."""
    await subject.answer(request(PROMPTS[0]))  # the prefix cache has the prompt from now on
    base = await subject.answer(request(PROMPTS[0]))
    same = await subject.answer(request(PROMPTS[0], (edit,)))
    assert logprobs_of(same) == logprobs_of(base)
    assert tokens_of(same) == tokens_of(base)


@each_setup
async def test_steering_that_overflows_fails_its_own_request_only(subject: Subject) -> None:
    overflow = (Edit("a", AffineSettings(3e38)),)
    plain, steered = await subject.submit(
        request(PROMPTS[0]), request(PROMPTS[0], overflow, SamplingSettings(9, 0))
    )
    with pytest.raises(InvalidRequestError, match="weaker settings") as caught:
        async for _ in steered:
            pass
    assert (caught.value.param, caught.value.code) == ("steering", "steering_overflow")
    outputs = [output async for output in plain]
    assert_greedy(outputs, subject.oracle, PROMPTS[0], ())
    # Others are given the memory in which its keys and values were no numbers.
    again = await asyncio.gather(
        *(subject.answer(request(prompt, STACKS["b"])) for prompt in PROMPTS * 4)
    )
    for outputs, prompt in zip(again, PROMPTS * 4, strict=True):
        assert_greedy(outputs, subject.oracle, prompt, stack_of(STACKS["b"]))
