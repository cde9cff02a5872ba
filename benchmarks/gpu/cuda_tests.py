"""The tests marked `cuda`, by a pytest that has no plugins."""

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from benchmarks.gpu.parts import ROOT, TESTS_SECONDS
from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows
from server.variables import DRY_RUN

_FOLDER: Final = "tests/cuda"
# Match the lines of `pytest -v`: a test and its outcome, or a line of the summary.
_OUTCOME: Final = re.compile(r"(?P<test>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")
_SUMMARY: Final = re.compile(r"(?:FAILED|ERROR) (?P<test>\S+::.+?)(?: - (?P<message>.*))?$")


def run(place: Place, rows: Rows) -> None:
    """Run them, and tell what failed, and how many passed, also where time has run out."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "--durations=10"),
            *("-c", f"{_FOLDER}/pytest.ini", "--rootdir", str(ROOT)),
            *("--confcutdir", _FOLDER, "-p", "no:cacheprovider", _FOLDER),
        ],
        cwd=ROOT,
        env=os.environ | _variables(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(TESTS_SECONDS, process.kill)
    timer.start()
    assert process.stdout is not None
    try:
        with process:
            count = _follow(process.stdout, rows)
    finally:
        timer.cancel()
    rows.tell(
        passed=count["PASSED"],
        failed=count["FAILED"] + count["ERROR"],
        skipped=count["SKIPPED"],
        complete=process.returncode >= 0,
    )
    if process.returncode or not count["PASSED"]:
        rows.failures += 1


def _variables(place: Place) -> Mapping[str, str]:
    return {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "COLUMNS": "250",  # of which a message gets what the test's name leaves
        DRY_RUN.name: "1" if place.device.type == "cpu" else "0",
    }


def _follow(lines: Iterable[str], rows: Rows) -> Counter[str]:
    """Copy pytest's lines, and tell each test that failed; how many had each outcome."""
    count: Counter[str] = Counter()
    for line in lines:
        sys.stdout.write(line)
        if found := _OUTCOME.match(line):
            count[found["outcome"]] += 1
            if found["outcome"] in ("FAILED", "ERROR"):
                rows.tell(test=found["test"], message=None)
        elif found := _SUMMARY.match(line):
            rows.tell(test=found["test"], message=found["message"])
    return count
