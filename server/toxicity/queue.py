"""Queues finished completions for toxicity scores, and has them scored."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from server.metrics import Arm, Metrics
from server.own_thread import in_own_thread
from server.toxicity.backlog import Backlog, Batch, Job
from server.toxicity.batches import Result, score_batch
from server.toxicity.pace import Pace
from server.toxicity.scorer import Scorer, ScoringError

logger = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 5.0
_RECHECK_SECONDS: Final = (
    0.25  # a pause is checked this often, because it ends when the other work does
)


class ScoringQueue:
    """Has texts scored in batches, each on a thread of its own, and records the scores.

    All methods are called on the event loop, so that the waiting texts need no lock. The scorer
    belongs to the queue, which closes it.
    """

    def __init__(
        self, scorer: Scorer, metrics: Metrics, capacity: int, pace: Pace | None = None
    ) -> None:
        """Make an empty queue; nothing is scored before `start`.

        Args:
            capacity: the most offered texts that may wait; further ones are dropped.
            pace: the pauses of offered texts; None for no pauses.
        """
        self._scorer = scorer
        self._metrics = metrics
        self._backlog = Backlog(capacity, pace)
        self._running: Sequence[Job] = ()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._failing = False
        metrics.watch_toxicity_queue(lambda: self.depth, lambda: self.longest_wait)

    @property
    def depth(self) -> int:
        """The number of texts that wait or are being scored."""
        return len(self._unscored)

    @property
    def longest_wait(self) -> float:
        """Seconds since the end of the completion that has waited longest; 0 if none waits."""
        since = min((job.since for job in self._unscored), default=None)
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Begin to score, on the running event loop."""
        if not self._closed:
            self._task = asyncio.create_task(self._run(), name="toxicity")

    def offer(self, text: str, intervention: str, arm: Arm) -> None:
        """Have a text scored for the metrics only; it is dropped if too many wait."""
        job = Job(text, intervention, arm, time.monotonic())
        if self._closed or not self._backlog.offer(job):
            self._metrics.not_scored.inc()
        self._changed.set()

    async def score(self, texts: Sequence[str], intervention: str, arm: Arm) -> list[float]:
        """Score texts before offered texts, without a limit, and return when they are scored.

        The metrics get the scores too. If the caller is cancelled, the texts that still wait become
        offered texts.

        Returns:
            The scores, 0 to 1, in the texts' order.

        Raises:
            ScoringError: a text could not be scored, or the queue is closed.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        answers = [loop.create_future() for _ in texts]
        jobs = [
            Job(text, intervention, arm, now, answer)
            for text, answer in zip(texts, answers, strict=True)
        ]
        if self._closed:
            self._fail(jobs, ScoringError("the server is shutting down"))
        self._backlog.ask([] if self._closed else jobs)
        self._changed.set()
        # All futures are awaited, because asyncio logs exceptions that are never retrieved.
        try:
            results = await asyncio.gather(*answers, return_exceptions=True)
        except asyncio.CancelledError:
            for _ in self._backlog.abandon(jobs):
                self._metrics.not_scored.inc()
            raise
        scores: list[float] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            scores.append(result)
        return scores

    async def close(self) -> None:
        """Fail all texts that wait or are being scored, then close the scorer.

        After a few seconds this returns although the scorer is still closing; the last batch's
        thread ends with the scorer. May be called again, and before `start`.
        """
        self._closed = True
        jobs = [*self._running, *self._backlog.clear()]
        self._running = ()
        self._fail(jobs, ScoringError("the server is shutting down"))
        self._changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.to_thread(self._scorer.close)
                if self._task is not None:
                    await asyncio.wait([self._task])

    @property
    def _unscored(self) -> Sequence[Job]:
        return [*self._running, *self._backlog.waiting]

    async def _run(self) -> None:
        while not self._closed:
            self._changed.clear()
            batch = self._backlog.take()
            if batch is None:
                await self._wait()
                continue
            self._running = batch.jobs
            try:
                await self._score_batch(batch)
            except Exception:
                logger.exception("completions are not scored: the queue has failed")
                self._fail(self._running, ScoringError("the toxicity queue has failed"))
            self._running = ()

    async def _wait(self) -> None:
        """Wait for a change, or until it is time to check the pause of offered texts again."""
        seconds = min(self._backlog.rest, _RECHECK_SECONDS) if self._backlog.waiting else None
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _score_batch(self, batch: Batch) -> None:
        texts = [job.text for job in batch.jobs]
        used = self._scorer.processor_seconds
        work = in_own_thread(partial(score_batch, self._scorer, texts))
        results = await asyncio.wrap_future(work)
        if self._closed:
            return  # `close` has failed these texts
        for job, result in zip(batch.jobs, results, strict=True):
            self._receive(job, result)
        errors = [result for result in results if isinstance(result, ScoringError)]
        self._report(errors)
        self._backlog.done(batch, self._scorer.processor_seconds - used, failed=bool(errors))

    def _receive(self, job: Job, result: Result) -> None:
        if isinstance(result, ScoringError):
            self._fail([job], result)
            return
        self._metrics.scored(job.intervention, job.arm, result, time.monotonic() - job.since)
        if job.answer is not None and not job.answer.done():
            job.answer.set_result(result)

    def _fail(self, jobs: Sequence[Job], error: ScoringError) -> None:
        for job in jobs:
            self._metrics.not_scored.inc()
            if job.answer is not None and not job.answer.done():
                job.answer.set_exception(error)

    def _report(self, errors: Sequence[ScoringError]) -> None:
        """Log once when scoring begins to fail, and once when it works again."""
        if errors and not self._failing:
            logger.warning("completions are not scored: %s", errors[0])
        elif self._failing and not errors:
            logger.info("completions are scored again")
        self._failing = bool(errors)
