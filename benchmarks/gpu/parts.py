"""The parts of a check, each a process of its own with a time limit."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
TESTS_SECONDS: Final = 115.0  # for pytest, so that its outcomes are told within the part's limit
_TAIL_LINES: Final = 25


@dataclass(frozen=True, slots=True)
class Part:
    """One part; all limits together are at most eight minutes."""

    name: str
    title: str
    seconds: float
    function: str  # "module:function" in `benchmarks.gpu`


PARTS: Final = (
    Part("environment", "Versions and device", 30, "environment:run"),
    Part("families", "Self-test, attention and graphs of each family", 75, "families:run"),
    Part("tests", "The tests marked `cuda`", TESTS_SECONDS + 10, "cuda_tests:run"),
    Part("replayed", "A random Llama, decoding by CUDA graphs", 125, "speed:run_replayed"),
    Part("eager", "A random Llama, without CUDA graphs", 70, "speed:run_eager"),
    Part("profile", "The slowest kernels of one steered decode step", 55, "profiling:run"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a part: whether it passed, and why not."""

    passed: bool
    how: str  # in a few words
    tail: str  # the last lines of its log, if it did not pass


def run_part(command: Sequence[str], seconds: float, log: Path) -> Outcome:
    """Run a part's command to its end, or for at most so many seconds.

    Args:
        command: the arguments for Python, without the interpreter.
        seconds: the time limit.
        log: the file to write all that the command prints to.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(seconds)
        how = f"failed with {status}" if status else "passed"
    except subprocess.TimeoutExpired:
        status, how = 1, f"ended after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            # The whole group ends, as whatever the part has started must not hold the device.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if status else []
    return Outcome(not status, how, "\n".join(lines))
