"""The completions that wait for their scores, and the thread that has them scored."""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from server.metrics import Arm, Metrics
from server.toxicity.batches import Result, score_batch
from server.toxicity.pace import Pace
from server.toxicity.scorer import Scorer, ScoringError

logger = logging.getLogger(__name__)

BATCH_SIZE: Final = 64
_CLOSE_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.25  # until somebody looks whether the other work has ended


@dataclass(slots=True, eq=False)
class _Job:
    """A text, and who waits for its score, if anybody does."""

    text: str
    intervention: str
    arm: Arm
    answer: asyncio.Future[float] | None = None
    since: float = field(default_factory=time.monotonic)


_Inbox: TypeAlias = "queue.SimpleQueue[list[_Job] | None]"


class ScoringQueue:
    """Has texts scored in batches, on one thread of its own, and records the scores.

    All methods are called on the event loop, which alone touches what waits. The scorer belongs to
    the queue, which closes it.
    """

    def __init__(
        self, scorer: Scorer, metrics: Metrics, capacity: int, pace: Pace | None = None
    ) -> None:
        """Nothing is scored before `start`.

        Args:
            capacity: how many texts may wait before further offered ones are dropped.
            pace: when offered texts are scored; as soon as can be, if None.
        """
        self._scorer = scorer
        self._metrics = metrics
        self._capacity = capacity
        self._pace = pace
        self._timer: asyncio.TimerHandle | None = None  # while offered texts are left to wait
        self._asked: deque[_Job] = deque()
        self._offered: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._inbox: _Inbox = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._closed = False
        self._failing = False
        metrics.watch_toxicity_queue(lambda: self.depth)

    @property
    def depth(self) -> int:
        """Texts that wait or are being scored."""
        return len(self._asked) + len(self._offered) + len(self._running)

    def start(self) -> None:
        """Start the thread, for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._work, args=(self._loop,), name="toxicity", daemon=True
        )
        self._thread.start()
        self._dispatch()

    def offer(self, text: str, intervention: str, arm: Arm) -> None:
        """Have a text scored for the metrics only; it is dropped where too many wait."""
        self._admit(_Job(text, intervention, arm))

    async def score(self, texts: Sequence[str], intervention: str, arm: Arm) -> list[float]:
        """Score texts that somebody waits for: before those that were offered, and always taken.

        Each is recorded in the metrics too. If the caller is cancelled, those that still wait are
        as if they had been offered.

        Returns:
            The scores, 0 to 1, in the texts' order.

        Raises:
            ScoringError: a text could not be scored, or the queue is closed.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(text, intervention, arm, loop.create_future()) for text in texts]
        if self._closed:
            self._fail(jobs, ScoringError("the server is shutting down"))
        else:
            self._asked.extend(jobs)
            self._dispatch()
        answers = [job.answer for job in jobs if job.answer is not None]
        # All are awaited: an exception that nobody fetches would be logged as a fault.
        try:
            results = await asyncio.gather(*answers, return_exceptions=True)
        except asyncio.CancelledError:
            self._abandon(jobs)
            raise
        scores: list[float] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            scores.append(result)
        return scores

    async def close(self) -> None:
        """End what waits and what is being scored, at once; then the scorer, and the thread.

        Returns after some seconds at most: a scorer that does not end by then goes on closing, and
        the thread ends with it. May be called again, and before `start`.
        """
        self._closed = True
        jobs = [*self._running, *self._asked, *self._offered]
        self._running = []  # not cleared: the thread reads the list
        self._asked.clear()
        self._offered.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._fail(jobs, ScoringError("the server is shutting down"))
        self._inbox.put(None)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.to_thread(self._scorer.close)
                if self._thread is not None:
                    await self._ended.wait()
                    self._thread.join()  # it has said its last word

    def _admit(self, job: _Job) -> None:
        if self._closed or len(self._asked) + len(self._offered) >= self._capacity:
            self._metrics.not_scored()
            return
        self._offered.append(job)
        self._dispatch()

    def _abandon(self, jobs: Sequence[_Job]) -> None:
        """Offer those texts that still wait, now that nobody waits for them."""
        waiting = set(jobs).intersection(self._asked)
        self._asked = deque(job for job in self._asked if job not in waiting)
        for job in jobs:
            if job in waiting:
                job.answer = None
                self._admit(job)

    def _dispatch(self) -> None:
        """Give the thread the next batch, if it has none; of what is asked for, or of the rest."""
        if self._thread is None or self._running:
            return
        jobs = self._asked or self._offered
        if not jobs or (jobs is self._offered and self._rests()):
            return
        self._running = [jobs.popleft() for _ in range(min(BATCH_SIZE, len(jobs)))]
        self._inbox.put(self._running)

    def _rests(self) -> bool:
        """Whether offered texts are to wait; they are looked at again in a while."""
        assert self._loop is not None
        rest = 0.0 if self._pace is None else self._pace.rest
        if self._timer is not None:
            self._timer.cancel()
        if rest:
            self._timer = self._loop.call_later(min(rest, _LOOK_SECONDS), self._dispatch)
        return bool(rest)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop was closed before this thread had ended
            while (batch := self._inbox.get()) is not None:
                began = time.monotonic()
                results = score_batch(self._scorer, [job.text for job in batch])
                seconds = time.monotonic() - began
                loop.call_soon_threadsafe(self._receive, results, seconds)
            loop.call_soon_threadsafe(self._ended.set)

    def _receive(self, results: Sequence[Result], seconds: float) -> None:
        if self._pace is not None:
            self._pace.worked(seconds)
        batch, self._running = self._running, []
        if not batch:
            return  # `close` has given it up
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, ScoringError):
                self._fail([job], result)
            else:
                self._record(job, result)
        self._report([result for result in results if isinstance(result, ScoringError)])
        self._dispatch()

    def _record(self, job: _Job, score: float) -> None:
        self._metrics.scored(job.intervention, job.arm, score, time.monotonic() - job.since)
        if job.answer is not None and not job.answer.done():
            job.answer.set_result(score)

    def _fail(self, jobs: Sequence[_Job], error: ScoringError) -> None:
        for job in jobs:
            self._metrics.not_scored()
            if job.answer is not None and not job.answer.done():
                job.answer.set_exception(error)

    def _report(self, errors: Sequence[ScoringError]) -> None:
        """Log that scoring fails, and that it works again, but not every batch's fault."""
        if errors and not self._failing and not self._closed:
            logger.warning("completions are not scored: %s", errors[0])
        elif self._failing and not errors:
            logger.info("completions are scored again")
        self._failing = bool(errors)
