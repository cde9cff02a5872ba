"""The tests marked `cuda`, by a pytest that has no plugins."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.gpu.parts import ROOT
from benchmarks.gpu.place import Place
from benchmarks.gpu.rows import Rows

_FOLDER: Final = "tests/cuda"
_LAST_LINES: Final = 3


def run(place: Place, rows: Rows) -> None:
    """Run them, and tell how many passed and what failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"),
                *("-c", f"{_FOLDER}/pytest.ini", "--rootdir", str(ROOT)),
                *("--confcutdir", _FOLDER, "-p", "no:cacheprovider", _FOLDER),
            ],
            cwd=ROOT,
            env=os.environ
            | {
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "STEERSERVE_DRY_RUN": "1" if place.device.type == "cpu" else "0",
            },
            check=False,
        ).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest has written no suite"
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    rows.tell(passed=passed, failed=failed, skipped=count["skipped"])
    for name, message in _failures(suite):
        rows.tell(test=name, message=message)
    if status or not passed:
        rows.failures += 1


def _failures(suite: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Each test that failed, with the last lines of what it said."""
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                lines = re.sub(r"\s*\n\s*", "\n", (found.text or "").strip()).splitlines()
                yield str(case.get("name")), " / ".join(lines[-_LAST_LINES:])
