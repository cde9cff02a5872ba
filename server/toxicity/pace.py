"""How much of the time is for scoring, while there is other work."""

import time
from collections.abc import Callable


class Pace:
    """Rests after work, so that work takes a share of the time only; not while nothing else runs.

    A process of the lowest priority still takes caches and memory bandwidth from the others.
    """

    def __init__(self, share: float, busy: Callable[[], bool]) -> None:
        """Args:
        share: of the time, more than 0; 1 never rests.
        busy: whether there is other work now.
        """
        self._share = share
        self._busy = busy
        self._rest_until = 0.0

    def worked(self, seconds: float) -> None:
        """Work has just ended that took so long."""
        self._rest_until = time.monotonic() + seconds * (1 / self._share - 1)

    @property
    def rest(self) -> float:
        """Seconds until there should be work again, if the other work goes on; 0: it is time."""
        return max(0.0, self._rest_until - time.monotonic()) if self._busy() else 0.0
