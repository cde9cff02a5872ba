"""Runs functions one after the other on a background thread, which ends when none is left."""

import threading
from collections import deque
from collections.abc import Callable


class BackgroundThread:
    """Runs functions on a thread of its own, in the order in which they are given."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: deque[Callable[[], None]] = deque()  # the first one is running
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """The number of functions that run or wait."""
        return len(self._queue)

    def run(self, function: Callable[[], None]) -> None:
        """Queue a function, which must not raise."""
        with self._changed:
            self._queue.append(function)
            if len(self._queue) == 1:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for all functions to run. Return False if some are left after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout)

    def _work(self) -> None:
        is_busy = True
        while is_busy:
            self._queue[0]()
            with self._changed:
                self._queue.popleft()
                is_busy = bool(self._queue)
                self._changed.notify_all()
