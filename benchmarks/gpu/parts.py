"""The parts of a check, each a process of its own with a time limit."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from benchmarks.gpu.rows import Row, read_row

ROOT: Final = Path(__file__).parent.parent.parent
TESTS_SECONDS: Final = 115.0  # of pytest, so that what it has shown is told in time
_TAIL_LINES: Final = 25


@dataclass(frozen=True, slots=True)
class Part:
    """One part; all limits together are at most eight minutes."""

    name: str  # `python -m benchmarks.gpu.part NAME` runs it
    title: str
    seconds: float

    def command(self, dry_run: bool) -> list[str]:
        """Give the command that runs the part."""
        command = [sys.executable, "-m", "benchmarks.gpu.part", self.name]
        return [*command, "--dry-run"] if dry_run else command


PARTS: Final = (
    Part("environment", "Versions and device", 30),
    Part("families", "Self-test, form of attention and graphs of each family", 75),
    Part("tests", "The tests marked `cuda`", TESTS_SECONDS + 10),
    Part("replayed", "A random Llama, decoding by CUDA graphs", 125),
    Part("eager", "A random Llama, without CUDA graphs", 70),
    Part("profile", "The kernels of one steered decode step, the longest first", 55),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part has ended."""

    passed: bool
    how: str  # in a few words
    tail: str  # the last lines that it wrote, if it did not pass


def run_part(
    command: Sequence[str], seconds: float, take: Callable[[Row], None], log: TextIO
) -> Outcome:
    """Run a part's command to its end, or for so many seconds.

    Args:
        take: is given each row as it comes.
        log: is given all that the command writes.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(_python_path())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        # With what it has started itself: a part that is stuck must not hold the device.
        os.killpg(process.pid, 9)

    timer = threading.Timer(seconds, end)
    timer.start()
    lines: list[str] = []
    try:
        with process:
            for line in process.stdout:
                log.write(line)
                row = read_row(line)
                if row is None:
                    lines = [*lines, line.rstrip()][-_TAIL_LINES:]
                else:
                    take(row)
    finally:
        timer.cancel()
    if late.is_set():
        return Outcome(False, f"ended after {seconds:.0f} s", "\n".join(lines))
    if process.returncode:
        return Outcome(False, f"failed with {process.returncode}", "\n".join(lines))
    return Outcome(True, "passed", "")


def _python_path() -> Iterator[str]:
    yield str(ROOT)
    if given := os.environ.get("PYTHONPATH"):
        yield given
