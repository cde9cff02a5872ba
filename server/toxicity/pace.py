"""Limits the processor time that scoring takes while this machine has other work."""

import time
from collections.abc import Callable


class Pace:
    """Says how long to pause after work, so that the work takes a share of one processor.

    There is no pause while nothing else runs. A low priority alone is not enough: a process of the
    lowest priority still takes caches and memory bandwidth from the others. Only used processor
    time counts, because waiting costs the other processes nothing.
    """

    def __init__(
        self,
        share: float,
        busy: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without a pause.

        Args:
            share: the share of one processor's time, more than 0; 1 takes all of it.
            busy: tells whether there is other work now.
            clock: returns the time in seconds, from any start.
        """
        self._share = share
        self._busy = busy
        self._clock = clock
        self._rest_until = 0.0

    def worked(self, began: float, processor_seconds: float) -> None:
        """Note that work has ended that began at `began`, by the clock.

        The pause counts from the work's beginning, so that slow work gets its share too.
        """
        self._rest_until = began + processor_seconds / self._share

    @property
    def rest(self) -> float:
        """Seconds of the pause that are left, if the other work goes on; 0 if work may begin."""
        return max(0.0, self._rest_until - self._clock()) if self._busy() else 0.0
