"""The texts that wait for their scores, and which of them are scored next."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from server.metrics import Arm
from server.toxicity.batch_size import BatchSize
from server.toxicity.pace import Pace

# Of texts that are asked for, while offered ones, whose rest is over, wait too.
BATCHES_IN_A_ROW: Final = 3


@dataclass(slots=True, eq=False)
class Job:
    """A text, since when it waits, and who waits for its score, if anybody does."""

    text: str
    intervention: str
    arm: Arm
    since: float
    answer: asyncio.Future[float] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are scored together, since a time of the backlog's clock."""

    jobs: Sequence[Job]
    asked: bool
    began: float


class Backlog:
    """Decides what is scored when; knows neither threads nor an event loop.

    Texts that somebody asks for go first and do not rest. Offered texts rest after each of their
    own batches, as `pace` says, and nothing else puts them off: once their rest is over, at most
    BATCHES_IN_A_ROW batches go before them. So they have their share, however much is asked for.
    """

    def __init__(
        self, capacity: int, pace: Pace | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        capacity: how many texts may wait before further offered ones find no room.
        pace: when offered texts are scored; as soon as can be, if None.
        clock: the time in seconds, from any moment on.
        """
        self._capacity = capacity
        self._pace = pace
        self._clock = clock
        self._asked: deque[Job] = deque()
        self._offered: deque[Job] = deque()
        self._sizes = BatchSize()
        self._passed = 0  # batches that went before offered texts whose rest was over

    @property
    def waiting(self) -> Sequence[Job]:
        """All that wait, in no order."""
        return [*self._asked, *self._offered]

    @property
    def rest(self) -> float:
        """Seconds for which offered texts are still to wait; 0 if they need not."""
        return 0.0 if self._pace is None else self._pace.rest

    def offer(self, job: Job) -> bool:
        """Let a text wait that nobody asks for. Returns whether there is room for it."""
        if len(self._offered) >= self._capacity:
            return False
        self._offered.append(job)
        return True

    def ask(self, jobs: Sequence[Job]) -> None:
        """Let texts wait that somebody asks for; there is always room."""
        self._asked.extend(jobs)

    def abandon(self, jobs: Sequence[Job]) -> list[Job]:
        """Offer those texts that still wait, now that nobody asks for them any more.

        Returns:
            Those for which there is no room.
        """
        left = set(jobs).intersection(self._asked)
        self._asked = deque(job for job in self._asked if job not in left)
        for job in left:
            job.answer = None
        return [job for job in jobs if job in left and not self.offer(job)]

    def clear(self) -> Sequence[Job]:
        """Take out all that wait."""
        jobs = self.waiting
        self._asked.clear()
        self._offered.clear()
        return jobs

    def take(self) -> Batch | None:
        """Take out the texts that are to be scored now; None if none are."""
        due = bool(self._offered) and not self.rest
        asked = bool(self._asked) and not (due and self._passed >= BATCHES_IN_A_ROW)
        if not asked and not due:
            return None
        self._passed = self._passed + 1 if asked and due else 0
        queue = self._asked if asked else self._offered
        jobs = [queue.popleft() for _ in range(min(self._sizes.size, len(queue)))]
        return Batch(jobs, asked, self._clock())

    def done(self, batch: Batch, processor_seconds: float, *, failed: bool) -> None:
        """A batch has just ended.

        Args:
            batch: as it was taken.
            processor_seconds: what it took of this machine's processors.
            failed: whether any of its texts has no score.
        """
        if failed:
            self._sizes.failed(len(batch.jobs))
        else:
            self._sizes.took(len(batch.jobs), self._clock() - batch.began)
        if self._pace is not None and not batch.asked:
            self._pace.worked(batch.began, processor_seconds)
