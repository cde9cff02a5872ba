"""Tests of which worker processes the watchdog kills, by the processor time that they use."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from server.toxicity import watchdog
from server.toxicity.watchdog import Watchdog, processor_seconds

LOOK = 0.02
LIMIT = "server.toxicity.watchdog._LONGEST"


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that only sleeps, and kill it at the end of the block."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            yield process
        finally:
            process.kill()


def measured(monkeypatch: pytest.MonkeyPatch, used: Callable[[int], float]) -> list[int]:
    """Have look n find `used(n)` s of processor time; return a list that grows with each look."""
    looks: list[int] = []

    def look(_pid: int) -> float:
        looks.append(1)
        return used(len(looks) - 1)

    monkeypatch.setattr(watchdog, "processor_seconds", look)
    return looks


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_starved_worker_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, 1e9)
    looks = measured(monkeypatch, lambda look: look * LOOK / 1000)
    with sleeping() as process:
        with Watchdog(process, LOOK) as dog:
            wait_until(lambda: len(looks) > 12)  # many times the limit in wall-clock time
        assert dog.killed_after is None
        assert process.poll() is None


def test_kills_after_ten_times_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = measured(monkeypatch, lambda look: look * LOOK / 1000)
    with sleeping() as process, Watchdog(process, LOOK) as dog:
        assert process.wait(30) < 0
        wait_until(lambda: dog.killed_after is not None)
        assert (dog.killed_after or 0) >= 10 * LOOK
    assert len(looks) > 1


def test_one_that_computes_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, 1e9)
    looks = measured(monkeypatch, lambda look: 5.0 + look * LOOK / 3.5)
    with sleeping() as process, Watchdog(process, LOOK):
        assert process.wait(30) < 0
    assert len(looks) == 5


def test_one_that_computes_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, 1e9)
    looks = measured(monkeypatch, lambda look: 5.0 + min(look, 2) * LOOK / 1000)
    with sleeping() as process, Watchdog(process, LOOK):
        assert process.wait(30) < 0
    assert len(looks) == 4


def test_processor_time_is_that_of_the_process() -> None:
    before = processor_seconds(os.getpid())
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert 0.1 <= processor_seconds(os.getpid()) - before < 20
    with sleeping() as process:
        pass
    assert processor_seconds(process.pid) == 0
