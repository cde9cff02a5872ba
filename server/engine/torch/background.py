"""Work for a thread of its own, one thing after the other; the thread ends when there is none."""

import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Runs functions in the order in which they are given, beside everything else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = False
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """Functions that wait or run."""
        return len(self._waiting) + self._running

    def run(self, function: Callable[[], None]) -> None:
        """Have a function run, which must not raise."""
        with self._changed:
            self._waiting.append(function)
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; False if something is after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                function = self._waiting.popleft()
            function()
