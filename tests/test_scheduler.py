import pytest

from server.engine.base import QueueFullError, Request, SamplingSettings
from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.scheduler import Chunk, Scheduler, Sequence


def sequence(prompt: int, max_tokens: int = 4) -> Sequence:
    request = Request("test", tuple(range(prompt)), SamplingSettings(max_tokens))
    return Sequence.of(request)


def scheduler(blocks: int = 100, batch: int = 8, tokens: int = 16, waiting: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size=4), batch, tokens, waiting)


def advance(chunks: list[Chunk]) -> None:
    """What a step does to its sequences."""
    sampling = [chunk for chunk in chunks if chunk.samples]
    for chunk in chunks:
        chunk.sequence.computed += chunk.count
    for chunk in sampling:
        chunk.sequence.tokens.append(0)


def counts(chunks: list[Chunk]) -> list[int]:
    return [chunk.count for chunk in chunks]


def test_a_long_prompt_is_computed_in_chunks_and_decodes_go_first() -> None:
    schedule = scheduler(tokens=10)
    short, long = sequence(3), sequence(25)
    schedule.add(short)
    schedule.add(long)
    first = schedule.schedule()
    assert counts(first) == [3, 7]
    assert [chunk.samples for chunk in first] == [True, False]
    advance(first)
    second = schedule.schedule()
    assert [chunk.sequence for chunk in second] == [short, long]
    assert counts(second) == [1, 9]
    assert second[1].start == 7
    advance(second)
    third = schedule.schedule()
    assert counts(third) == [1, 9]
    assert third[1].samples
    advance(third)
    assert counts(schedule.schedule()) == [1, 1]


def test_a_later_decode_goes_before_an_earlier_prefill() -> None:
    schedule = scheduler(batch=4, tokens=4)
    long, short = sequence(9), sequence(1)
    schedule.add(long)
    advance(schedule.schedule())
    advance(schedule.schedule())
    schedule.add(short)
    chunks = schedule.schedule()
    assert [(chunk.sequence, chunk.count) for chunk in chunks] == [(long, 1), (short, 1)]
    advance(chunks)
    another = sequence(9)
    schedule.add(another)
    chunks = schedule.schedule()
    assert counts(chunks) == [1, 1, 2]
    advance(chunks)
    assert counts(schedule.schedule()) == [1, 1, 2]


def test_the_waiting_queue_is_bounded() -> None:
    schedule = scheduler(waiting=2)
    schedule.add(sequence(1))
    schedule.add(sequence(1))
    with pytest.raises(QueueFullError, match="2 requests"):
        schedule.check_room(1)


def test_an_empty_queue_takes_what_one_client_asks_for_at_once() -> None:
    schedule = scheduler(waiting=2)
    schedule.check_room(5)
    schedule.add(sequence(1))
    schedule.check_room(1)
    with pytest.raises(QueueFullError):
        schedule.check_room(2)


def test_a_sequence_waits_until_the_blocks_of_its_longest_completion_are_free() -> None:
    schedule = scheduler(blocks=4)
    first, second = sequence(4, max_tokens=5), sequence(4, max_tokens=4)  # 3 blocks and 2
    schedule.add(first)
    schedule.add(second)
    assert [chunk.sequence for chunk in schedule.schedule()] == [first]
    assert list(schedule.waiting) == [second]
    schedule.remove(first)
    assert [chunk.sequence for chunk in schedule.schedule()] == [second]
    schedule.remove(second)
    assert schedule.pool.free == 4
    assert schedule.schedule() == []


def test_a_sequence_that_does_not_fit_yet_is_not_overtaken() -> None:
    schedule = scheduler(blocks=4)
    running, large, small = sequence(4, 5), sequence(4, 9), sequence(1, 1)
    for each in (running, large, small):
        schedule.add(each)
    assert [chunk.sequence for chunk in schedule.schedule()] == [running]
    assert list(schedule.waiting) == [large, small]


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    schedule = scheduler(batch=2)
    for _ in range(3):
        schedule.add(sequence(1))
    assert len(schedule.schedule()) == 2
    assert len(schedule.waiting) == 1


def test_a_waiting_sequence_can_be_removed() -> None:
    schedule = scheduler(batch=1)
    first, second = sequence(1), sequence(1)
    schedule.add(first)
    schedule.add(second)
    schedule.schedule()
    schedule.remove(second)
    schedule.remove(second)
    assert not schedule.waiting
    assert schedule.running == [first]


def test_every_running_sequence_must_be_able_to_take_its_turn() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens \(4\) must be at least"):
        scheduler(batch=8, tokens=4)
