"""How much of this machine's processors scoring takes, while they have other work."""

import time
from collections.abc import Callable


class Pace:
    """Rests after work, so that work takes a share of a processor; not while nothing else runs.

    A process of the lowest priority still takes caches and memory bandwidth from the others. Only
    the processor time that was used counts: who waits, for a processor or for another machine,
    takes nothing from anybody.
    """

    def __init__(
        self,
        share: float,
        busy: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        share: of one processor's time, more than 0; 1 never rests.
        busy: whether there is other work now.
        clock: the time in seconds, from any moment on.
        """
        self._share = share
        self._busy = busy
        self._clock = clock
        self._rest_until = 0.0

    def worked(self, began: float, processor_seconds: float) -> None:
        """Work has ended that began at a time of the clock, and used so much processor time.

        The rest is counted from the work's begin: then slow work gets its share too.
        """
        self._rest_until = began + processor_seconds / self._share

    @property
    def rest(self) -> float:
        """Seconds until there should be work again, if the other work goes on; 0: it is time."""
        return max(0.0, self._rest_until - self._clock()) if self._busy() else 0.0
