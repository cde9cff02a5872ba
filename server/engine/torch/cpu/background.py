"""Work for a thread of its own, one thing after the other; the thread ends when there is none."""

import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Runs functions in the order in which they are given, beside everything else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._left: deque[Callable[[], None]] = deque()  # the first of them runs
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """Functions that run or wait."""
        return len(self._left)

    def run(self, function: Callable[[], None]) -> None:
        """Have a function run, which must not raise."""
        with self._changed:
            self._left.append(function)
            if len(self._left) == 1:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; False if something is after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, timeout)

    def _work(self) -> None:
        left = True
        while left:
            self._left[0]()
            with self._changed:
                self._left.popleft()
                left = bool(self._left)
                self._changed.notify_all()
