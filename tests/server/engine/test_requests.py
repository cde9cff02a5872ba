"""Tests on both engines how requests are admitted, refused and cancelled, and that each is freed.

The fixture checks after each test that nothing is held for anybody.
"""

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from server.engine.chat import Conversation
from server.engine.errors import (
    BankFullError,
    EngineError,
    InvalidRequestError,
    NoBackgroundRoomError,
    QueueFullError,
    UnservableInterventionError,
)
from server.engine.request import Edit, Request, SamplingSettings
from steering.settings import AffineSettings
from tests.both_engines import (
    CONTEXT,
    INTERVENTIONS,
    UNREADABLE,
    Subject,
    each_engine,
    each_setup,
    each_tight,
    finished,
    request,
)
from tests.prefix_traffic import stack_of
from tests.serving import eventually
from tests.steered import GREEDY, PROMPTS, STACKS, assert_greedy, tokens_of
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="session")
ENDLESS = SamplingSettings(CONTEXT - len(PROMPTS[0]), temperature=0, ignore_eos=True)
SHORT = request(b"hello", sampling=SamplingSettings(2, 0, ignore_eos=True))
LONG = replace(SHORT, sampling=replace(SHORT.sampling, max_tokens=CONTEXT - 5))
SCORED = request(b"hello", (), SamplingSettings(0, prompt_logprobs=0, prompt_logprobs_from=3))


def affine(digest: str, strength: float = 1.0) -> tuple[Edit, ...]:
    return (Edit(digest, AffineSettings(strength)),)


async def fill(subject: Subject, one: Request = LONG) -> list[Any]:
    """Submit requests until the queue is full."""
    generations = []
    while True:
        try:
            generations += await subject.submit(one)
        except QueueFullError:
            return generations


def cancel_all(generations: list[Any]) -> None:
    for generation in generations:
        generation.cancel()


@each_setup
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_cancelled_request_ends(subject: Subject, after: int) -> None:
    [generation] = await subject.submit(request(PROMPTS[0], affine("a"), ENDLESS))
    outputs = aiter(generation)
    for _ in range(after):
        await anext(outputs)
    generation.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        async for _ in outputs:
            pass
    generation.cancel()


@each_setup
async def test_clients_that_leave_one_after_another_free_all_that_they_held(
    subject: Subject,
) -> None:
    generations = await subject.submit(
        *(
            request(PROMPTS[number % 4], STACKS[name], replace(ENDLESS, max_tokens=100))
            for number, name in enumerate(("base", "a", "r", "b then a", "a and r") * 3)
        )
    )
    async for _ in generations[0]:
        break
    for generation in generations:
        generation.cancel()
        await asyncio.sleep(0.003)


@each_engine
async def test_a_client_that_leaves_during_admission_leaves_nothing_behind(
    subject: Subject,
) -> None:
    for delay in (0, 0, 0.001, 0.002, 0.004, 0.01):
        # "c" and the four of the stack take each other's slots, or are loaded anew.
        task = asyncio.create_task(subject.submit(request(PROMPTS[0], affine("c"), ENDLESS)))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            cancel_all(await task)
        await subject.answer(replace(SHORT, edits=STACKS["four"]))


@each_setup
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "says"),
    [
        ((), 1, "prompt", "empty"),
        ((1,) * CONTEXT, 1, "prompt", "256 in the prompt"),
        ((1,) * 600, 1, "prompt", "600 in the prompt"),
        ((1,) * 250, 7, "max_tokens", "250 in the prompt; 7 for the completion"),
        ((1, 259), 1, "prompt", r"0\.\.258"),
        ((1, -1), 1, "prompt", r"0\.\.258"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_and_says_why(
    subject: Subject, prompt: tuple[int, ...], max_tokens: int, param: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        await subject.submit(request(prompt, (), SamplingSettings(max_tokens)))
    assert refused.value.param == param


@each_engine
async def test_a_bias_of_an_unknown_token_is_refused(subject: Subject) -> None:
    sampling = replace(SHORT.sampling, logit_bias=((5, 1.0), (259, 1.0)))
    with pytest.raises(InvalidRequestError, match="259 is not") as refused:
        await subject.submit(replace(SHORT, sampling=sampling))
    assert refused.value.param == "logit_bias"


@each_setup
async def test_the_longest_requests_are_served(subject: Subject) -> None:
    assert subject.engine.max_model_len == CONTEXT
    longest = [request(b"0123456789", sampling=replace(ENDLESS, max_tokens=CONTEXT - 10))] * 3
    sampling = replace(ENDLESS, max_tokens=6)
    found = await asyncio.gather(
        *(subject.answer(each) for each in longest),
        subject.answer(request((1,) * 250, (), sampling)),
    )
    assert [len(tokens_of(each)) for each in found] == [CONTEXT - 10] * 3 + [6]
    assert tokens_of(found[0]) == tokens_of(found[1]) == tokens_of(found[2])


@each_setup
async def test_the_queue_is_bounded(subject: Subject) -> None:
    setup = subject.setup
    running = await subject.submit(*[LONG] * setup.batch)
    await eventually(lambda: subject.engine.stats().running > 0)
    waiting = await fill(subject, request(b"hello", affine("a"), LONG.sampling))
    # A request of the batch may wait too while there is no memory for all of them.
    assert 1 <= len(waiting) <= setup.waiting
    with pytest.raises(QueueFullError):
        await subject.submit(SHORT, SHORT)
    cancel_all([*waiting, *running])
    assert len(tokens_of(await subject.answer(SHORT))) == 2


@each_setup
async def test_an_idle_engine_admits_any_number_at_once(subject: Subject) -> None:
    """A client may ask for more choices than the queue holds."""
    capacity = subject.setup.batch + subject.setup.waiting
    generations = await subject.submit(*[SHORT] * (capacity + 5))
    with pytest.raises(QueueFullError):
        await subject.submit(SHORT)
    found = await asyncio.gather(*map(finished, generations))
    assert len({tuple(tokens_of(each)) for each in found}) == 1


@each_setup
async def test_interventions_take_turns_in_the_slots(subject: Subject) -> None:
    for _ in range(2):
        for digest in ("a", "b", "supported", "attention", "gated", "c", "gated and supported"):
            outputs = await subject.answer(request(PROMPTS[3], affine(digest)))
            stack = stack_of(affine(digest))
            assert_greedy(outputs, subject.oracle, PROMPTS[3], stack)
        assert_greedy(
            await subject.answer(request(PROMPTS[3], STACKS["r"])),
            subject.oracle,
            PROMPTS[3],
            stack_of(STACKS["r"]),
        )
    assert subject.engine.stats().slots_used == subject.setup.slots


@each_tight
async def test_a_request_waits_for_no_slot_that_others_hold(subject: Subject) -> None:
    holders = await subject.submit(
        *(request(b"x", affine(digest), ENDLESS) for digest in ("a", "b", "supported", "gated"))
    )
    with pytest.raises(BankFullError):
        await subject.submit(SHORT, replace(SHORT, edits=affine("c")))
    with pytest.raises(InvalidRequestError, match="5 interventions at once") as refused:
        await subject.submit(
            *(
                replace(SHORT, edits=affine(digest))
                for digest in ("a", "b", "supported", "gated", "c")
            )
        )
    assert refused.value.param == "steering"
    cancel_all(holders)
    outputs = await subject.answer(request(b"x", affine("c")))
    assert_greedy(outputs, subject.oracle, b"x", stack_of(affine("c")))


@each_tight
async def test_stacks_that_compete_for_slots_never_hold_and_wait(subject: Subject) -> None:
    """A request gets all of its slots or none, so that two requests never block each other."""
    names = ("a", "b", "c", "supported", "gated", "attention")
    stacks = [
        tuple(edit for digest in (one, two, three) for edit in affine(digest, 0.3))
        for one, two, three in zip(names, names[1:], names[2:], strict=False)
    ] * 4
    async with asyncio.timeout(120):
        found = await asyncio.gather(
            *(subject.answer(replace(SHORT, edits=stack)) for stack in stacks)
        )
    assert [len(tokens_of(each)) for each in found] == [2] * len(stacks)


@each_engine
async def test_an_intervention_at_a_site_that_the_engine_lacks_is_refused(
    subject: Subject,
) -> None:
    for _ in range(2):
        with pytest.raises(UnservableInterventionError, match=r"model\.layers\.7\.mlp"):
            await subject.submit(request(b"x", (*affine("a"), *affine("elsewhere"))))
    assert "elsewhere" in INTERVENTIONS
    assert_greedy(
        await subject.answer(request(b"x", affine("a"))),
        subject.oracle,
        b"x",
        stack_of(affine("a")),
    )


@each_engine
async def test_an_intervention_that_cannot_be_read_is_refused(subject: Subject) -> None:
    with pytest.raises(UnservableInterventionError):
        await subject.submit(replace(SHORT, edits=affine(UNREADABLE)))
    assert len(tokens_of(await subject.answer(SHORT))) == 2


@each_engine
async def test_a_full_queue_does_not_refuse_a_follower(subject: Subject) -> None:
    [leader] = await subject.submit(replace(SHORT, has_follower=True))
    assert len(tokens_of(await finished(leader))) == 2
    endless = await fill(subject)
    follower = await leader.follow(replace(SCORED, edits=affine("a")))
    with pytest.raises(QueueFullError):
        await subject.submit(SHORT)
    cancel_all(endless)
    [output] = await finished(follower)
    assert len(output.prompt_logprobs) == len(SCORED.prompt) - 3
    again = await fill(subject)
    assert len(again) == len(endless) + 1, "the place is still taken"
    cancel_all(again)


@each_engine
@pytest.mark.parametrize("has_finished", [False, True])
async def test_who_is_cancelled_gives_the_followers_place_up(
    subject: Subject, has_finished: bool
) -> None:
    [leader] = await subject.submit(replace(SHORT, has_follower=True))
    if has_finished:
        await finished(leader)
    leader.cancel()
    leader.cancel()
    await subject.settle()
    with pytest.raises(EngineError, match="no place"):
        await leader.follow(SCORED)
    many = [SHORT] * (subject.setup.batch + subject.setup.waiting)
    assert len(await subject.generate(*many)) == len(many)


@each_engine
async def test_followers_need_a_reserved_place_once(subject: Subject) -> None:
    alone, leader = await subject.submit(SHORT, replace(SHORT, has_follower=True))
    with pytest.raises(EngineError, match="no place"):
        await alone.follow(SHORT)
    with pytest.raises(InvalidRequestError, match="Token ids"):
        await leader.follow(replace(SHORT, prompt=(-1,)))  # it may come again
    follower = await leader.follow(SHORT)
    with pytest.raises(EngineError, match="no place"):
        await leader.follow(SHORT)
    for generation in (alone, leader, follower):
        assert len(tokens_of(await finished(generation))) == 2


@each_engine
async def test_a_followers_place_counts_when_its_leader_is_admitted(subject: Subject) -> None:
    setup = subject.setup
    others = await subject.submit(*[LONG] * (setup.batch + setup.waiting - 2))
    leader = replace(LONG, has_follower=True)
    with pytest.raises(QueueFullError):
        await subject.submit(leader, SHORT)
    others += await subject.submit(leader)
    with pytest.raises(QueueFullError):
        await subject.submit(SHORT)
    cancel_all(others)


@each_engine
async def test_who_stops_waiting_for_a_followers_admission_leaves_nothing(
    subject: Subject,
) -> None:
    [leader] = await subject.submit(replace(SHORT, has_follower=True))
    await finished(leader)
    following = asyncio.create_task(leader.follow(replace(LONG, edits=affine("c"))))
    await asyncio.sleep(0)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    leader.cancel()


@each_engine
async def test_background_work_gives_what_a_request_gives(subject: Subject) -> None:
    sampling = replace(GREEDY, max_tokens=60)
    expected = tokens_of(await subject.answer(request(PROMPTS[0], affine("a"), sampling)))
    one = replace(request(PROMPTS[0], affine("a"), sampling), background=True)
    found, beside = await subject.generate(one, request(PROMPTS[0], (), sampling))
    assert tokens_of(found) == expected != tokens_of(beside)
    [alone] = await subject.submit(one)
    await anext(aiter(alone))
    assert (subject.engine.stats().running, subject.engine.stats().waiting) == (0, 0)
    assert tokens_of(await finished(alone)) == expected[1:]


@each_engine
async def test_background_work_is_ended_for_requests_that_want_its_place(
    subject: Subject,
) -> None:
    batch = subject.setup.batch
    background = await subject.submit(*[replace(LONG, background=True)] * 3)
    answers = await subject.submit(*[replace(SHORT, sampling=GREEDY)] * batch)
    ended = await asyncio.gather(*map(finished, background), return_exceptions=True)
    assert all(isinstance(each, NoBackgroundRoomError) for each in ended)
    assert all([len(tokens_of(await finished(each))) == GREEDY.max_tokens for each in answers])


@each_engine
async def test_background_work_is_not_begun_without_room(subject: Subject) -> None:
    running = await subject.submit(*[LONG] * subject.setup.batch)
    with pytest.raises(NoBackgroundRoomError):
        await subject.submit(replace(SHORT, background=True))
    cancel_all(running)
    await subject.settle()
    [outputs] = await subject.generate(replace(SHORT, background=True))
    assert len(tokens_of(outputs)) == 2


@each_engine
async def test_background_admission_takes_no_queue_place(subject: Subject) -> None:
    many = [SHORT] * (subject.setup.batch + subject.setup.waiting - 1)
    for _ in range(10):
        background = asyncio.create_task(subject.submit(replace(LONG, background=True)))
        await asyncio.sleep(0)  # lets the background request's admission begin
        assert len(tokens_of(await subject.answer(SHORT))) == 2
        cancel_all(await background)
    assert len(await subject.generate(*many)) == len(many)


@each_engine
async def test_what_a_finished_request_says(subject: Subject) -> None:
    [generation] = await subject.submit(request(PROMPTS[0], STACKS["a and r"]))
    outputs = await finished(generation)
    assert outputs[0].queue_seconds is not None
    assert all(output.queue_seconds is None for output in outputs[1:])
    generation.cancel()  # does nothing after the end
    async with asyncio.timeout(5):
        assert await finished(generation) == []


@each_engine
async def test_text_and_tokens(subject: Subject) -> None:
    prompts = subject.engine.prompts
    tokens = prompts.tokenize("h\u00e9llo")
    assert tiny_tokenizer().decode(tokens) == prompts.detokenize(tokens) == "h\u00e9llo"
    conversation = Conversation(({"role": "user", "content": "x"},))
    assert prompts.read_chat(conversation).tokens == prompts.tokenize("<user>x<assistant>")
    assert subject.engine.model.architecture == "LlamaForCausalLM"
