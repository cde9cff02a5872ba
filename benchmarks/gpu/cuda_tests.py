"""Runs the tests marked `cuda`, by a pytest without plugins."""

import os
import time
from collections import Counter
from typing import Final

import pytest

from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import ROOT, TESTS_SECONDS
from benchmarks.gpu.place import Place
from server.variables import DRY_RUN

_FOLDER: Final = "tests/cuda"


class Reporter:
    """A pytest plugin that tells each failure at once, and ends the tests when time has run out."""

    def __init__(self, page: Page, seconds: float) -> None:
        self.count: Counter[str] = Counter()  # of tests by outcome: passed, failed or skipped
        self.complete = True
        self._page = page
        self._end = time.monotonic() + seconds

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the outcome; of a test's setup and teardown only what is not a pass."""
        if report.when != "call" and report.passed:
            return
        self.count[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message, *_ = str(crash.message if crash else report.longrepr).partition("\n")
            self._page.tell(test=report.nodeid, message=message[:250])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """End the tests after this one if time has run out."""
        if time.monotonic() > self._end:
            self.complete = False
            pytest.exit(f"{nodeid} was the last test that began in time", returncode=1)


def run(place: Place, page: Page) -> None:
    """Run the tests; tell which failed and how many passed, even if the time runs out."""
    os.environ |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        DRY_RUN.name: "1" if place.device.type == "cpu" else "0",
    }
    reporter = Reporter(page, TESTS_SECONDS)
    arguments = [
        *("-v", "--tb=short", "--durations=10", "-c", f"{_FOLDER}/pytest.ini"),
        *("--rootdir", str(ROOT), "--confcutdir", _FOLDER, "-p", "no:cacheprovider", _FOLDER),
    ]
    status = pytest.main(arguments, plugins=[reporter])
    count = reporter.count
    page.tell(
        passed=count["passed"],
        failed=count["failed"],
        skipped=count["skipped"],
        complete=reporter.complete,
    )
    if status or not count["passed"]:
        page.failures += 1
