"""Kills a worker that does not answer."""

import subprocess
import threading
import time
from contextlib import suppress
from typing import Final

import psutil

_LONGEST: Final = 10  # times the limit; the client has left by then


class Watchdog:
    """Kills a process that hangs or computes without end, during a `with` block.

    A process of the lowest priority may wait long for a processor that others use, so the time that
    has passed does not show that it hangs. The process is killed when it has used no processor time
    for `seconds`, or has used `seconds` of it, and in any case after ten times `seconds`.
    """

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._process = process
        self._seconds = seconds
        self._begun = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="toxicity-watchdog", daemon=True)
        self.killed_after: float | None = None
        """Seconds after which the process was killed; None if it was not."""

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        first = used = processor_seconds(self._process.pid)
        while not self._over.wait(self._seconds):
            before, used = used, processor_seconds(self._process.pid)
            passed = time.monotonic() - self._begun
            hangs = used == before
            if hangs or used - first >= self._seconds or passed >= _LONGEST * self._seconds:
                self.killed_after = passed
                self._process.kill()
                return


def processor_seconds(pid: int) -> float:
    """Return the processor time, in seconds, that a process has used; 0 if it does not exist."""
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0
