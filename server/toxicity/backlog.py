"""Keeps the texts that wait for their scores, and chooses which are scored next."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from server.metrics import Arm
from server.toxicity.batch_size import BatchSize
from server.toxicity.pace import Pace

# Most batches of asked texts in a row while offered texts are due.
BATCHES_IN_A_ROW: Final = 3


@dataclass(slots=True, eq=False)
class Job:
    """A text to score. `answer` gets the score, if a request waits for it."""

    text: str
    intervention: str
    arm: Arm
    since: float  # when the completion ended, by time.monotonic()
    answer: asyncio.Future[float] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are scored together. `began` is the batch's start by the backlog's clock."""

    jobs: Sequence[Job]
    asked: bool
    began: float


class Backlog:
    """Decides which texts are scored when; uses neither threads nor an event loop.

    Asked texts are those whose scores a request waits for; offered texts are scored for the metrics
    only. Asked texts go first. Offered texts pause after each of their own batches for as long as
    `pace` says. After the pause they are due: at most BATCHES_IN_A_ROW batches of asked texts go
    before the next batch of offered texts.
    """

    def __init__(
        self, capacity: int, pace: Pace | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make an empty backlog.

        Args:
            capacity: the most offered texts that may wait.
            pace: the pauses of offered texts; None for no pauses.
            clock: returns the time in seconds, from any start.
        """
        self._capacity = capacity
        self._pace = pace
        self._clock = clock
        self._asked: deque[Job] = deque()
        self._offered: deque[Job] = deque()
        self._sizes = BatchSize()
        self._passed = 0  # batches of asked texts since offered texts were due

    @property
    def waiting(self) -> Sequence[Job]:
        """All waiting texts, in no particular order."""
        return [*self._asked, *self._offered]

    @property
    def rest(self) -> float:
        """Seconds until offered texts are due; 0 if they are."""
        return 0.0 if self._pace is None else self._pace.rest

    def offer(self, job: Job) -> bool:
        """Add an offered text; return False if there is no room for it."""
        if len(self._offered) >= self._capacity:
            return False
        self._offered.append(job)
        return True

    def ask(self, jobs: Sequence[Job]) -> None:
        """Add asked texts, without a limit."""
        self._asked.extend(jobs)

    def abandon(self, jobs: Sequence[Job]) -> list[Job]:
        """Turn asked texts that still wait into offered texts, because their request has gone.

        Returns:
            The texts that were dropped, because there was no room for them.
        """
        left = set(jobs).intersection(self._asked)
        self._asked = deque(job for job in self._asked if job not in left)
        for job in left:
            job.answer = None
        return [job for job in jobs if job in left and not self.offer(job)]

    def clear(self) -> Sequence[Job]:
        """Remove and return all waiting texts."""
        jobs = self.waiting
        self._asked.clear()
        self._offered.clear()
        return jobs

    def take(self) -> Batch | None:
        """Remove and return the texts to score now; None if there are none."""
        due = bool(self._offered) and not self.rest
        asked = bool(self._asked) and not (due and self._passed >= BATCHES_IN_A_ROW)
        if not asked and not due:
            return None
        self._passed = self._passed + 1 if asked and due else 0
        queue = self._asked if asked else self._offered
        jobs = [queue.popleft() for _ in range(min(self._sizes.size, len(queue)))]
        return Batch(jobs, asked, self._clock())

    def done(self, batch: Batch, processor_seconds: float, *, failed: bool) -> None:
        """Note that a batch has just ended.

        Args:
            batch: the batch that `take` returned.
            processor_seconds: the processor time that it took on this machine.
            failed: whether any of its texts has no score.
        """
        if failed:
            self._sizes.failed(len(batch.jobs))
        else:
            self._sizes.took(len(batch.jobs), self._clock() - batch.began)
        if self._pace is not None and not batch.asked:
            self._pace.worked(batch.began, processor_seconds)
