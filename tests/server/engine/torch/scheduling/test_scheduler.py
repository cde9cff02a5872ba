"""Tests which tokens the scheduler puts into a step, and its queue, blocks and preemptions."""

from collections.abc import Sequence as Items
from dataclasses import replace

import pytest

from server.engine.errors import QueueFullError
from server.engine.request import Request, SamplingSettings
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.scheduler import BACKGROUND_TOKENS, Chunk, Scheduler
from server.engine.torch.scheduling.sequence import Sequence
from tests.schedules import step


def sequence(
    prompt: int, max_tokens: int = 4, prompt_logprobs: int | None = None, first: int = 1
) -> Sequence:
    sampling = SamplingSettings(
        max_tokens, prompt_logprobs=prompt_logprobs, prompt_logprobs_from=first
    )
    return Sequence.of(Request("test", tuple(range(prompt)), sampling))


def scheduler(
    *sequences: Sequence, blocks: int = 100, batch: int = 8, tokens: int = 16, waiting: int = 8
) -> Scheduler:
    schedule = Scheduler(BlockPool(blocks, block_size=4), batch, tokens, waiting)
    for each in sequences:
        schedule.add(each)
    return schedule


def counts(chunks: Items[Chunk]) -> list[int]:
    return [chunk.count for chunk in chunks]


def test_a_long_prompt_is_computed_in_chunks_and_decodes_go_first() -> None:
    short, long = sequence(3, 9), sequence(25, 9)
    schedule = scheduler(short, long, tokens=10)
    first = schedule.schedule().chunks
    assert counts(first) == [3, 7]
    assert [chunk.draws for chunk in first] == [True, False]
    step(schedule)
    second = step(schedule)
    assert [chunk.sequence for chunk in second] == [short, long]
    assert counts(second) == [1, 9]
    assert second[1].start == 7
    third = step(schedule)
    assert counts(third) == [1, 9]
    assert third[1].end == 25
    assert counts(step(schedule)) == [1, 1]


def test_a_later_decode_goes_before_an_earlier_prefill() -> None:
    long, short = sequence(9, 9), sequence(1, 9)
    schedule = scheduler(long, batch=4, tokens=4)
    step(schedule)
    step(schedule)
    schedule.add(short)
    chunks = step(schedule)
    assert [(chunk.sequence, chunk.count) for chunk in chunks] == [(long, 1), (short, 1)]
    schedule.add(sequence(9))
    assert counts(step(schedule)) == [1, 1, 2]
    assert counts(step(schedule)) == [1, 1, 2]


def test_background_takes_little_of_a_step_that_others_wait_for() -> None:
    request, background = sequence(3, 2), sequence(40, 9)
    background.request = replace(background.request, background=True)
    second = sequence(40, 9)
    second.request = replace(second.request, background=True)
    schedule = scheduler(tokens=32)
    schedule.check_background(background, second)
    for each in (background, second, request):
        schedule.add(each)
    chunks = step(schedule)
    assert [chunk.sequence for chunk in chunks] == [request, background]
    assert counts(chunks) == [3, BACKGROUND_TOKENS]
    assert counts(step(schedule)) == [1, BACKGROUND_TOKENS]  # the request's last token is drawn
    assert counts(step(schedule)) == [40 - 2 * BACKGROUND_TOKENS, 32 - (40 - 2 * BACKGROUND_TOKENS)]


def test_the_waiting_queue_is_bounded() -> None:
    schedule = scheduler(*(sequence(1) for _ in range(4)), batch=2, waiting=2)
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)
    step(schedule)
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)


def test_an_empty_queue_takes_what_one_client_asks_for_at_once() -> None:
    schedule = scheduler(batch=1, waiting=2)
    schedule.check_room(5)
    schedule.add(sequence(1))
    schedule.check_room(5)  # the queued sequence can start at once, so the queue counts as empty
    schedule.add(sequence(1))
    schedule.check_room(1)
    with pytest.raises(QueueFullError):
        schedule.check_room(2)


def test_what_could_start_at_once_does_not_wait() -> None:
    schedule = scheduler(batch=4, waiting=2)
    for _ in range(4 + 2):
        schedule.check_room(1)
        schedule.add(sequence(1))
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)


def test_what_has_a_place_but_no_memory_waits() -> None:
    # Two sequences hold one of three blocks each, and one stays spare for the first to grow.
    schedule = scheduler(blocks=3, batch=8, waiting=2)
    for _ in range(2 + 2):
        schedule.check_room(1)
        schedule.add(sequence(4))
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)
    assert len(step(schedule)) == 2
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)


def test_background_work_takes_no_place_from_what_arrives() -> None:
    background = sequence(8, 4)
    background.request = replace(background.request, background=True)
    schedule = scheduler(background, blocks=3, batch=1, waiting=1)
    schedule.add(sequence(4))
    schedule.check_room(5)
    schedule.add(sequence(4))
    with pytest.raises(QueueFullError, match="1 requests"):
        schedule.check_room(1)
    assert schedule.schedule().dropped == [background]


def test_a_sequence_holds_the_blocks_of_the_tokens_that_it_has() -> None:
    schedule = scheduler(sequence(7, 9), blocks=4)
    held = []
    for _ in range(9):
        step(schedule)
        held.append(4 - schedule.pool.free_blocks)
    # A block is taken in the step that computes its first token.
    assert held == [2, 2, 3, 3, 3, 3, 4, 4, 0]


def test_a_sequence_starts_with_a_block_to_spare_for_each_that_runs() -> None:
    first, second = sequence(4, 5), sequence(4, 4)
    schedule = scheduler(first, second, blocks=3)
    assert [chunk.sequence for chunk in step(schedule)] == [first, second]
    third = sequence(1, 1)
    schedule.add(third)
    assert third not in [chunk.sequence for chunk in step(schedule)]
    schedule.remove(first)
    assert [chunk.sequence for chunk in step(schedule)] == [second]
    schedule.remove(second)
    assert [chunk.sequence for chunk in step(schedule)] == [third]
    assert schedule.pool.free_blocks == 3


def test_a_sequence_that_does_not_fit_yet_is_not_overtaken() -> None:
    running, large, small = sequence(4, 5), sequence(10, 2), sequence(1, 1)
    schedule = scheduler(running, large, small, blocks=4)
    assert [chunk.sequence for chunk in step(schedule)] == [running]
    assert list(schedule.waiting) == [large, small]


def test_when_no_block_is_left_the_youngest_yields_and_is_computed_anew() -> None:
    old, young = sequence(4, 8), sequence(3, 6)
    schedule = scheduler(old, young, blocks=3)
    assert counts(step(schedule)) == [4, 3]
    assert counts(step(schedule)) == [1, 1]  # the old one takes the last free block
    plan = schedule.schedule()
    assert plan.preempted == [young]
    assert [chunk.sequence for chunk in plan.chunks] == [old]
    assert list(schedule.waiting) == [young]
    assert young.computed_tokens == 0
    assert len(young.tokens) == 5
    while old in schedule.running:
        step(schedule)
    [again] = schedule.schedule().chunks
    assert (again.sequence, again.start, again.count) == (young, 0, 5)
    assert again.draws


def test_a_sequence_may_have_to_yield_itself() -> None:
    old, young = sequence(3, 8), sequence(4, 8)
    schedule = scheduler(old, young, blocks=3)
    step(schedule)
    old_grows_too = sequence(1, 1)
    schedule.add(old_grows_too)
    step(schedule)
    assert young in schedule.running
    old.tokens += [0, 0]  # makes `old` need its second block in the next step
    plan = schedule.schedule()
    assert plan.preempted == [young]
    assert list(schedule.waiting) == [young, old_grows_too], "it does not lose its place"


def test_the_last_one_running_is_never_preempted() -> None:
    alone = sequence(4, 8)
    schedule = scheduler(alone, blocks=3)
    for _ in range(8):
        assert [chunk.sequence for chunk in step(schedule)] == [alone]
    assert not schedule.running


def test_what_can_never_fit_is_not_taken() -> None:
    schedule = scheduler(blocks=3)
    with pytest.raises(AssertionError, match="for ever"):
        schedule.add(sequence(4, 9))


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    schedule = scheduler(sequence(1), sequence(1), sequence(1), batch=2)
    assert len(schedule.schedule().chunks) == 2
    assert len(schedule.waiting) == 1


def test_a_waiting_sequence_can_be_removed() -> None:
    first, second = sequence(1), sequence(1)
    schedule = scheduler(first, second, batch=1)
    schedule.schedule()
    schedule.remove(second)
    schedule.remove(second)
    assert not schedule.waiting
    assert schedule.running == [first]


def test_every_running_sequence_must_be_able_to_take_its_turn() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens \(4\) must be at least"):
        scheduler(batch=8, tokens=4)


def test_logits_are_needed_where_a_token_is_drawn() -> None:
    schedule = scheduler(sequence(10, 3), tokens=8)
    assert [list(chunk.logits_positions) for _ in range(4) for chunk in places(schedule)] == [
        *([], [9], [10], [11])
    ]


def test_logits_are_needed_after_each_prompt_token_that_is_scored_and_once_only() -> None:
    scored = sequence(10, 8, prompt_logprobs=0)
    schedule = scheduler(scored, tokens=8)
    assert [list(chunk.logits_positions) for _ in range(3) for chunk in places(schedule)] == [
        *(list(range(8)), [8, 9], [10])
    ]
    schedule._preempt_youngest()
    assert [list(chunk.logits_positions) for _ in range(3) for chunk in places(schedule)] == [
        *([], [11], [12])
    ]


def test_logits_are_needed_from_the_first_token_that_is_scored_on() -> None:
    schedule = scheduler(sequence(10, 2, prompt_logprobs=0, first=7), tokens=8)
    assert [list(chunk.logits_positions) for _ in range(3) for chunk in places(schedule)] == [
        *([6, 7], [8, 9], [10])
    ]
    [only_read] = scheduler(sequence(5, 0, prompt_logprobs=0, first=4)).schedule().chunks
    assert list(only_read.logits_positions) == [3]


def test_a_prompt_that_is_only_read_draws_nothing() -> None:
    schedule = scheduler(sequence(5, 0, prompt_logprobs=1), sequence(5, 0))
    scored, plain = schedule.schedule().chunks
    assert list(scored.logits_positions) == [0, 1, 2, 3]
    assert list(plain.logits_positions) == []
    assert scored.completes
    assert not scored.draws


def places(schedule: Scheduler) -> list[Chunk]:
    """Run a step, and return its chunks with copies of their sequences from before the step."""
    chunks = [
        Chunk(_copy(chunk.sequence), chunk.start, chunk.count)
        for chunk in schedule.schedule().chunks
    ]
    step(schedule)
    return chunks


def _copy(original: Sequence) -> Sequence:
    copy = Sequence.of(original.request)
    copy.tokens = list(original.tokens)
    copy.scored_prompt_tokens = original.scored_prompt_tokens
    return copy
