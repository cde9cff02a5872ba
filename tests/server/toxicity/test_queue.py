"""Tests of the queue in front of a scorer: its order, exact counts, failures, and shutdown.

A text is "asked for" where a client waits for its score, and "offered" where nobody does.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence

import psutil
import pytest

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from server.metrics import Metrics
from server.toxicity.backlog import Backlog
from server.toxicity.pace import Pace
from server.toxicity.process import ScorerProcess
from server.toxicity.profanity import ProfanityScorer
from server.toxicity.queue import ScoringQueue
from server.toxicity.scorer import ScoringError
from tests.scoring import FakeClock
from tests.serving import eventually
from tests.toxicity_service import scoring_service

CAPACITY = 100


class Gated:
    """A scorer that gives "5" the score 0.05. While its gate is shut it waits, until `close`."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.threads: set[threading.Thread] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self.processor_seconds = 0.0
        self.batch_seconds = 0.0  # processor time of each batch

    def score(self, texts: Sequence[str]) -> list[float]:
        self.asked.append(list(texts))
        self.threads.add(threading.current_thread())
        self.processor_seconds += self.batch_seconds
        assert self.gate.wait(20)
        if self.closed:
            raise ScoringError("closed")
        if "bad" in texts:
            raise ScoringError("a bad text")
        return [int(text) / 100 for text in texts]

    def close(self) -> None:
        self.closed = True
        self.gate.set()


class Stuck(Gated):
    """A scorer that `close` does not stop."""

    def close(self) -> None:
        pass


@pytest.fixture
def metrics(tiny_engine: TorchEngine, registry: Registry) -> Metrics:
    return Metrics(tiny_engine, registry, "tiny")


@pytest.fixture
def scorer() -> Gated:
    return Gated()


@pytest.fixture
async def scoring(scorer: Gated, metrics: Metrics) -> AsyncIterator[ScoringQueue]:
    faults: list[object] = []  # exceptions that the event loop would only log
    asyncio.get_running_loop().set_exception_handler(lambda _loop, fault: faults.append(fault))
    scoring = ScoringQueue(scorer, metrics, CAPACITY)
    scoring.start()
    yield scoring
    await scoring.close()
    await asyncio.sleep(0)
    assert faults == []
    assert scoring.depth == 0
    assert not any(thread.is_alive() for thread in scorer.threads)


def sample(metrics: Metrics, name: str) -> float:
    """Return the sum of a metric's samples over all labels."""
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    values = (line.rpartition(" ") for line in lines)
    return sum(
        float(value) for key, _, value in values if key.split("{")[0] == f"steerserve_{name}"
    )


def counts(metrics: Metrics) -> tuple[float, float, float]:
    """Return how many texts were scored, how many were dropped, and how many wait."""
    scored = sample(metrics, "completion_toxicity_count")
    assert sample(metrics, "toxicity_scoring_seconds_count") == scored
    return (
        scored,
        sample(metrics, "toxicity_dropped_total"),
        sample(metrics, "toxicity_queue_depth"),
    )


def scored_texts(scorer: Gated) -> list[str]:
    """Return the texts of all the scorer's batches, in order."""
    return [text for batch in scorer.asked for text in batch]


async def shut(scoring: ScoringQueue, scorer: Gated) -> None:
    """Shut the scorer's gate and hold one text, "0", in it, so that all further texts wait."""
    scorer.gate.clear()
    scoring.offer("0", "none", "served")
    await eventually(lambda: scorer.asked == [["0"]])


async def test_scores_come_back_in_order_and_are_recorded(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    assert await scoring.score(["90", "10", "60"], "detox", "served") == [0.9, 0.1, 0.6]
    assert await scoring.score(["55"], "detox", "baseline") == [0.55]
    assert await scoring.score([], "detox", "baseline") == []
    assert counts(metrics) == (4, 0, 0)
    page = metrics.render().decode()
    for line in (
        'completion_toxicity_count{arm="served",intervention="detox"} 3.0',
        'completion_toxicity_sum{arm="served",intervention="detox"} 1.6',
        'completion_toxicity_sum{arm="baseline",intervention="detox"} 0.55',
        'toxic_completions_total{arm="served",intervention="detox",threshold="0.5"} 2.0',
        'toxic_completions_total{arm="served",intervention="detox",threshold="0.8"} 1.0',
        'toxic_completions_total{arm="baseline",intervention="detox",threshold="0.5"} 1.0',
    ):
        assert f"steerserve_{line}\n" in page
    assert threading.current_thread() not in scorer.threads


async def test_offered_texts_are_scored_in_batches(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    for number in range(CAPACITY):
        scoring.offer(str(number), "none", "served")
    assert scoring.depth == 1 + CAPACITY
    assert counts(metrics) == (0, 0, 1 + CAPACITY)
    scorer.gate.set()
    await eventually(lambda: scoring.depth == 0)
    # The first batch is one text; later sizes are learned from how long batches take.
    assert [len(batch) for batch in scorer.asked[:2]] == [1, 2]
    assert len(scorer.asked) < CAPACITY / 2
    assert scored_texts(scorer)[1:] == [str(number) for number in range(CAPACITY)]
    assert counts(metrics) == (1 + CAPACITY, 0, 0)


async def test_what_is_offered_to_a_full_queue_is_dropped_and_what_is_asked_is_not(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    for _ in range(CAPACITY + 7):
        scoring.offer("1", "none", "served")
    asked = asyncio.create_task(scoring.score(["2", "3"], "none", "served"))
    await eventually(lambda: scoring.depth == 1 + CAPACITY + 2)
    assert counts(metrics) == (0, 7, 1 + CAPACITY + 2)
    scoring.offer("1", "none", "served")
    scorer.gate.set()
    assert await asked == [0.02, 0.03]
    await eventually(lambda: scoring.depth == 0)
    assert counts(metrics) == (1 + CAPACITY + 2, 8, 0)
    scoring.offer("1", "none", "served")
    await eventually(lambda: counts(metrics) == (1 + CAPACITY + 3, 8, 0))


async def test_what_somebody_waits_for_goes_first(scoring: ScoringQueue, scorer: Gated) -> None:
    await shut(scoring, scorer)
    for number in range(70):
        scoring.offer(str(number), "none", "served")
    asked = [asyncio.create_task(scoring.score([str(n)], "none", "served")) for n in (71, 72)]
    await eventually(lambda: scoring.depth == 73)
    scorer.gate.set()
    assert await asyncio.gather(*asked) == [[0.71], [0.72]]
    await eventually(lambda: scoring.depth == 0)
    # Asked texts get a batch of their own; else they would wait for offered texts in it as well.
    assert scorer.asked[1] == ["71", "72"]
    assert scored_texts(scorer)[3:] == [str(number) for number in range(70)]


async def test_seconds_are_from_the_text_to_its_score(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    begun = asyncio.get_running_loop().time()
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await eventually(lambda: scoring.depth == 0)
    seconds = sample(metrics, "toxicity_scoring_seconds_sum")
    assert 0.05 <= seconds < asyncio.get_running_loop().time() - begun + 1


async def test_a_bad_text_fails_for_itself(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    await shut(scoring, scorer)
    good = asyncio.create_task(scoring.score(["1", "2"], "none", "served"))
    bad = asyncio.create_task(scoring.score(["3", "bad", "4"], "none", "served"))
    scoring.offer("5", "none", "served")
    await eventually(lambda: scoring.depth == 7)
    scorer.gate.set()
    assert await good == [0.01, 0.02]
    with pytest.raises(ScoringError, match="a bad text"):
        await bad
    await eventually(lambda: scoring.depth == 0)
    assert counts(metrics) == (6, 1, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "completions are not scored: a bad text"
    ]


async def test_failures_are_logged_once_until_it_works_again(
    scoring: ScoringQueue, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.toxicity")
    for text in ("bad", "bad", "1", "bad"):
        scoring.offer(text, "none", "served")
        await eventually(lambda: scoring.depth == 0)
    assert counts(metrics) == (1, 3, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "completions are not scored: a bad text",
        "completions are scored again",
        "completions are not scored: a bad text",
    ]


@pytest.mark.parametrize("texts", [["1"], ["1", "2"], ["1", "bad"]])
@pytest.mark.parametrize("scored_now", [True, False])
async def test_a_waiter_that_leaves_costs_nothing(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics, texts: list[str], scored_now: bool
) -> None:
    if scored_now:
        scorer.gate.clear()
    else:
        await shut(scoring, scorer)
    asked = asyncio.create_task(scoring.score(texts, "none", "served"))
    await eventually(lambda: scoring.depth == len(texts) + (not scored_now))
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    scorer.gate.set()
    await eventually(lambda: scoring.depth == 0)
    failed = texts.count("bad")
    assert counts(metrics) == (len(texts) - failed + (not scored_now), failed, 0)


async def leave(scoring: ScoringQueue, *requests: list[str]) -> None:
    """Ask for the scores of each request's texts, and cancel before there are any."""
    before = scoring.depth
    tasks = [asyncio.create_task(scoring.score(texts, "none", "served")) for texts in requests]
    await eventually(lambda: scoring.depth == before + sum(map(len, requests)))
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_what_was_left_goes_behind_those_who_stay(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    scoring.offer("1", "none", "served")
    await leave(scoring, ["2", "3"], ["4"])
    stays = asyncio.create_task(scoring.score(["5"], "none", "served"))
    await eventually(lambda: scoring.depth == 6)
    scorer.gate.set()
    assert await stays == [0.05]
    await eventually(lambda: scoring.depth == 0)
    assert scorer.asked[:2] == [["0"], ["5"]]
    assert scored_texts(scorer)[2:] == ["1", "2", "3", "4"]
    assert counts(metrics) == (6, 0, 0)


async def test_requests_that_are_left_do_not_fill_the_queue_without_end(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    for _ in range(10):
        await leave(scoring, ["1"] * 16)
    assert counts(metrics) == (0, 160 - CAPACITY, 1 + CAPACITY)
    stays = asyncio.create_task(scoring.score(["2"], "none", "served"))
    await eventually(lambda: scoring.depth == 1 + CAPACITY + 1)
    # Offered texts fill the queue, so the text that is left now is dropped.
    await leave(scoring, ["1"])
    assert counts(metrics) == (0, 161 - CAPACITY, 1 + CAPACITY + 1)
    scorer.gate.set()
    assert await stays == [0.02]
    await eventually(lambda: scoring.depth == 0)
    assert counts(metrics) == (1 + CAPACITY + 1, 161 - CAPACITY, 0)


async def test_what_comes_before_the_start_waits_for_it(metrics: Metrics) -> None:
    scorer = Gated()
    scoring = ScoringQueue(scorer, metrics, 1)
    scoring.offer("1", "none", "served")
    scoring.offer("2", "none", "served")
    assert scoring.depth == 1
    scoring.start()
    await eventually(lambda: scoring.depth == 0)
    await scoring.close()
    assert counts(metrics) == (1, 1, 0)


async def test_close_fails_what_waits(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    await shut(scoring, scorer)
    asked = asyncio.create_task(scoring.score(["1", "2"], "none", "served"))
    scoring.offer("3", "none", "served")
    await eventually(lambda: scoring.depth == 4)
    await scoring.close()
    assert scorer.closed
    with pytest.raises(ScoringError, match="shutting down"):
        await asked
    assert counts(metrics) == (0, 4, 0)
    scoring.offer("4", "none", "served")
    with pytest.raises(ScoringError, match="shutting down"):
        await scoring.score(["5", "6"], "none", "served")
    await scoring.close()
    assert counts(metrics) == (0, 7, 0)
    assert scorer.asked == [["0"]]


async def test_close_before_the_start(metrics: Metrics) -> None:
    scorer = Gated()
    scoring = ScoringQueue(scorer, metrics, CAPACITY)
    scoring.offer("1", "none", "served")
    await scoring.close()
    assert scorer.closed
    scoring.start()
    scoring.offer("2", "none", "served")
    await scoring.close()
    assert scorer.asked == []
    assert counts(metrics) == (0, 2, 0)
    assert not scorer.threads


async def test_close_does_not_wait_for_a_scorer_that_hangs(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.toxicity.queue._CLOSE_SECONDS", 0.05)
    scorer = Stuck()
    scoring = ScoringQueue(scorer, metrics, CAPACITY)
    scoring.start()
    scorer.gate.clear()
    asked = asyncio.create_task(scoring.score(["1"], "none", "served"))
    await eventually(lambda: scorer.asked == [["1"]])
    closing = asyncio.create_task(scoring.close())
    with pytest.raises(ScoringError, match="shutting down"):
        await asked
    assert not closing.done()  # the waiting client is told first
    await closing
    assert counts(metrics) == (0, 1, 0)
    scorer.gate.set()
    await eventually(lambda: not any(thread.is_alive() for thread in scorer.threads))
    await scoring.close()
    assert counts(metrics) == (0, 1, 0)


async def test_a_scorers_fault_does_not_end_the_thread(metrics: Metrics) -> None:
    scoring = ScoringQueue(Gated(), metrics, CAPACITY)
    scoring.start()
    with pytest.raises(ScoringError, match=r"failed: ValueError$"):
        await scoring.score(["no number"], "none", "served")
    assert await scoring.score(["7"], "none", "served") == [0.07]
    await scoring.close()
    assert counts(metrics) == (1, 1, 0)


async def test_a_fault_of_the_queues_own_is_told_and_does_not_end_it(
    scoring: ScoringQueue,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "scored", lambda *_: 1 / 0)
        with pytest.raises(ScoringError, match="queue has failed"):
            await scoring.score(["1"], "none", "served")
    assert await scoring.score(["2"], "none", "served") == [0.02]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    assert counts(metrics) == (1, 1, 0)


async def test_with_the_embedded_scorer_in_its_process(metrics: Metrics) -> None:
    process = ScorerProcess("embedded")
    scoring = ScoringQueue(process, metrics, CAPACITY)
    scoring.start()
    texts = ["You stupid asshole.", "Hello", "", "lone \ud800"]
    for text in texts:
        scoring.offer(text, "none", "served")
    scores = await scoring.score(texts, "none", "served")
    await eventually(lambda: scoring.depth == 0)
    await scoring.close()
    assert not psutil.pid_exists(process.pid)
    assert scores[:3] == ProfanityScorer().score(texts[:3])
    assert counts(metrics) == (8, 0, 0)
    assert sample(metrics, "completion_toxicity_sum") == pytest.approx(2 * sum(scores))


@pytest.mark.parametrize("stopped", [False, True])
async def test_close_ends_a_batch_of_a_process_at_once(metrics: Metrics, stopped: bool) -> None:
    with scoring_service() as service:
        process = ScorerProcess(service.url)
        scoring = ScoringQueue(process, metrics, CAPACITY)
        scoring.start()
        service.hold()
        asked = asyncio.create_task(scoring.score(["a", "b", "c"], "none", "served"))
        scoring.offer("d", "none", "served")
        await eventually(service.arrived.is_set)
        if stopped:
            os.kill(process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        await scoring.close()
        assert time.monotonic() - begun < 1
        with pytest.raises(ScoringError, match="shutting down"):
            await asked
    assert not psutil.pid_exists(process.pid)
    assert counts(metrics) == (0, 4, 0)


async def test_while_others_work_offered_texts_wait_and_asked_ones_do_not(
    scorer: Gated, metrics: Metrics
) -> None:
    busy = True
    clock = FakeClock()
    scorer.batch_seconds = 1.0
    scoring = ScoringQueue(scorer, metrics, CAPACITY, Pace(0.01, lambda: busy, clock))
    scoring.start()
    scoring.offer("1", "none", "served")
    await eventually(lambda: scoring.depth == 0)  # there is no rest before the first batch
    scoring.offer("2", "none", "served")
    assert await scoring.score(["3"], "none", "served") == [0.03]
    assert scorer.asked == [["1"], ["3"]]
    assert scoring.depth == 1
    busy = False
    await eventually(lambda: scoring.depth == 0)
    assert scorer.asked == [["1"], ["3"], ["2"]]
    busy = True
    scoring.offer("4", "none", "served")
    await scoring.close()
    assert scoring.depth == 0


async def test_texts_that_are_asked_for_do_not_lengthen_the_rest(
    scorer: Gated, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    # The backlog uses the same clock, so that the rest is counted from the start of the batch.
    monkeypatch.setattr(
        "server.toxicity.queue.Backlog",
        lambda capacity, pace: Backlog(capacity, pace, clock),
    )
    scorer.batch_seconds = 1.0
    scoring = ScoringQueue(scorer, metrics, CAPACITY, Pace(0.01, lambda: True, clock))
    scoring.start()
    scoring.offer("1", "none", "served")
    await eventually(lambda: scoring.depth == 0)
    for number in (2, 3, 4):
        clock.now += 30
        assert await scoring.score([str(number)], "none", "served") == [number / 100]
    scoring.offer("5", "none", "served")
    assert await scoring.score(["6"], "none", "served") == [0.06]
    assert scoring.depth == 1  # 90 s of the 100 s of rest are over
    clock.now += 10
    await eventually(lambda: scoring.depth == 0)
    assert scored_texts(scorer) == ["1", "2", "3", "4", "6", "5"]
    await scoring.close()


async def test_the_longest_wait_is_told(
    scoring: ScoringQueue, scorer: Gated, metrics: Metrics
) -> None:
    assert sample(metrics, "toxicity_longest_wait_seconds") == 0
    began = time.monotonic()
    await shut(scoring, scorer)
    await asyncio.sleep(0.1)
    scoring.offer("1", "none", "served")
    waited = sample(metrics, "toxicity_longest_wait_seconds")
    assert 0.1 <= waited <= time.monotonic() - began  # of the text in the scorer
    scorer.gate.set()
    await eventually(lambda: scoring.depth == 0)
    assert sample(metrics, "toxicity_longest_wait_seconds") == 0
