"""Tests of which texts are scored when, over minutes of traffic on a clock that the test moves.

A text is "asked for" where a client waits for its score, and "offered" where nobody does.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from server.toxicity.backlog import BATCHES_IN_A_ROW, Backlog, Batch, Job
from server.toxicity.batch_size import TARGET_SECONDS
from server.toxicity.pace import Pace
from tests.scoring import FakeClock

TICK = 0.02
SHARE = 0.03
CAPACITY = 64
TEXT_SECONDS = 2 / 64  # a batch of 64 takes two seconds


@dataclass
class Cost:
    """The seconds and the processor seconds (of this machine) that a batch of n texts takes."""

    seconds: Callable[[int], float]
    processor_seconds: Callable[[int], float]


HEAVY_HERE = Cost(lambda texts: texts * TEXT_SECONDS, lambda texts: texts * TEXT_SECONDS)
# Other work has the processors, so scoring takes long and yet uses little processor time.
STARVED_HERE = Cost(lambda texts: 20 * texts * TEXT_SECONDS / 64, lambda texts: texts * 0.0005)
ELSEWHERE = Cost(lambda _: 2.0, lambda _: 0.001)


@dataclass
class Traffic:
    """Counts the texts of one run: how many were offered, dropped and scored."""

    offered: int = 0
    dropped: int = 0
    scored: int = 0  # offered texts that were scored
    asked_seconds: list[float] = field(default_factory=list)  # of each asked text, until its score
    processor_seconds: float = 0.0  # spent on offered texts


def job(clock: FakeClock, text: str = "a") -> Job:
    return Job(text, "none", "served", clock.now)


def run(
    cost: Cost,
    seconds: float,
    *,
    here: bool,
    rate: float = 2.0,
    asked_every: float | None = None,
    busy: Callable[[float], bool] = lambda _: True,
) -> Traffic:
    """Simulate traffic: offer `rate` texts a second, and ask for one every `asked_every` seconds.

    `here` says that this machine scores, so that scoring rests while `busy` says it is busy.
    """
    clock = FakeClock(0.0)
    pace = Pace(SHARE, lambda: busy(clock.now), clock) if here else None
    backlog = Backlog(CAPACITY, pace, clock)
    traffic = Traffic()
    running: Batch | None = None
    end = next_asked = 0.0
    while clock.now < seconds:
        while traffic.offered <= clock.now * rate:
            traffic.offered += 1
            traffic.dropped += not backlog.offer(job(clock))
        if asked_every is not None and clock.now >= next_asked:
            next_asked += asked_every
            backlog.ask([job(clock)])
        if running is not None and clock.now >= end:
            used = cost.processor_seconds(len(running.jobs))
            backlog.done(running, used, failed=False)
            if running.asked:
                traffic.asked_seconds += [clock.now - each.since for each in running.jobs]
            else:
                traffic.scored += len(running.jobs)
                traffic.processor_seconds += used
            running = None
        if running is None and (running := backlog.take()) is not None:
            end = clock.now + cost.seconds(len(running.jobs))
        clock.now += TICK
    return traffic


def test_another_machine_scores_all_that_it_can() -> None:
    """With two texts a second and two seconds a batch, an earlier version dropped 137 of 290."""
    traffic = run(ELSEWHERE, 145, here=False)
    assert traffic.offered == 290
    assert traffic.dropped == 0
    assert traffic.scored >= 280  # the last texts still wait


def test_a_scorer_that_waits_for_a_processor_need_not_rest() -> None:
    traffic = run(STARVED_HERE, 145, here=True)
    assert traffic.dropped == 0
    assert traffic.scored >= 280


def test_a_heavy_scorer_takes_its_share_and_no_more() -> None:
    traffic = run(HEAVY_HERE, 600, here=True)
    assert SHARE * 0.9 <= traffic.processor_seconds / 600 <= SHARE * 1.05
    assert traffic.scored >= 0.9 * SHARE / TEXT_SECONDS * 600  # 518 of 1,200


@pytest.mark.parametrize("asked_every", [20.0, 5.0, 1.0])
def test_texts_that_are_asked_for_take_nothing_from_those_that_are_offered(
    asked_every: float,
) -> None:
    """With one text asked for every 20 s, an earlier version scored 1 of 739 offered texts."""
    traffic = run(HEAVY_HERE, 370, here=True, asked_every=asked_every)
    assert traffic.offered == 740
    assert traffic.scored >= 0.85 * SHARE / TEXT_SECONDS * 370  # 301
    assert len(traffic.asked_seconds) >= 370 / asked_every - 1
    assert max(traffic.asked_seconds) <= 1.2 * TARGET_SECONDS


def test_offered_texts_have_their_share_of_a_scorer_that_never_rests_either() -> None:
    traffic = run(HEAVY_HERE, 300, here=True, asked_every=TICK)  # 50 a second; it can score 32
    assert traffic.processor_seconds / 300 >= SHARE * 0.8
    traffic = run(HEAVY_HERE, 300, here=False, rate=40, asked_every=TICK)
    share = traffic.processor_seconds / 300
    assert share == pytest.approx(1 / (1 + BATCHES_IN_A_ROW), rel=0.05)


def test_nobody_rests_while_nothing_else_runs() -> None:
    traffic = run(HEAVY_HERE, 100, here=True, rate=20, busy=lambda _: False)
    assert traffic.dropped == 0
    assert traffic.scored >= 1900
    halfway = run(HEAVY_HERE, 100, here=True, rate=20, busy=lambda now: now < 50)
    assert 900 <= halfway.scored < 1200


async def test_what_is_abandoned_is_offered_where_there_is_room() -> None:
    clock = FakeClock()
    backlog = Backlog(4, None, clock)
    jobs = [job(clock, str(number)) for number in range(4)]
    for each in jobs:
        each.answer = asyncio.get_running_loop().create_future()
    backlog.ask(jobs)
    batch = backlog.take()
    assert batch is not None
    (running,) = batch.jobs
    assert backlog.offer(job(clock, "offered"))
    assert backlog.abandon(jobs) == []  # the text that is being scored needs no room
    assert running.answer is not None
    assert [each.text for each in backlog.waiting] == ["offered", "1", "2", "3"]
    assert all(each.answer is None for each in jobs[1:])
    assert backlog.abandon(jobs) == []
    more = [job(clock, "more") for _ in range(2)]
    backlog.ask(more)
    assert backlog.abandon(more) == more
    assert backlog.offer(job(clock)) is False
    assert len(backlog.clear()) == 4
    assert backlog.take() is None
