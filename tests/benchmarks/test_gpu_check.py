"""`make gpu-check`: all of it on the CPU, without what serves; and parts that fail or get stuck."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import PARTS, ROOT, Outcome, run_part

# Packages that this environment has and a bare machine lacks.
_LACKING = (
    *("pydantic", "pydantic_settings", "fastapi", "starlette", "typer", "httpx", "uvicorn"),
    *("pytest_asyncio", "pytest_timeout", "hypothesis", "prometheus_client", "rich"),
)
_BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Others:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {_LACKING!r}:
            return None
        return PathFinder.find_spec(name, path, target)

    invalidate_caches = PathFinder.invalidate_caches
    find_distributions = PathFinder.find_distributions

sys.meta_path = [Others if each is PathFinder else each for each in sys.meta_path]
"""


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_dry_run_passes_where_nothing_that_serves_is_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    blocked = subprocess.run(
        command("import pydantic"), env=environment, capture_output=True, text=True
    )
    assert "No module named 'pydantic'" in blocked.stderr
    arguments = f"ARGS=--dry-run --out {tmp_path}"
    done = subprocess.run(
        # A make within another would have its folder as the last line.
        ["make", "--no-print-directory", "gpu-check", f"PYTHON={sys.executable}", arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(PARTS)} of {len(PARTS)} parts passed"
    told = json.loads((tmp_path / "gpu.json").read_text())
    rows = {part["name"]: part["rows"] for part in told["parts"]}
    assert rows.keys() == {part.name for part in PARTS}
    assert all(rows.values()), "a part has told nothing"
    [counts] = rows["tests"]
    assert counts["passed"] > 10
    assert (counts["failed"], counts["complete"]) == (0, True)
    for name in ("replayed", "eager"):
        speeds = [row for row in rows[name] if "tokens_per_s" in row]
        assert {row["steering"] for row in speeds} == {"none", "LinEAS", "ARGRE", "both"}
        assert {row["distinct"] for row in speeds} == {1, 4}
        assert any("first_token_ms" in row for row in rows[name])
    assert sum("kernel" in row for row in rows["profile"]) >= 20
    assert "4 of" not in (tmp_path / "gpu.md").read_text().splitlines()[-1]


def test_all_parts_together_take_eight_minutes_at_most() -> None:
    assert sum(part.seconds for part in PARTS) <= 8 * 60


def test_what_a_bare_machine_needs_is_imported_without_the_servers_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    modules = ["server.measuring.table", "benchmarks.gpu.page", "benchmarks.gpu.part"]
    modules += [f"benchmarks.gpu.{part.function.partition(':')[0]}" for part in PARTS]
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); "
        f"[importlib.import_module(each) for each in {modules}]; "
        f"assert not {set(_LACKING)!r} & sys.modules.keys()"
    )
    done = subprocess.run(
        command(code),
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_part_that_is_stuck_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid); print('almost'); time.sleep(60)"
    )
    log = tmp_path / "log"
    began = time.monotonic()
    outcome = run_part(["-c", code], 5.0, log)
    assert time.monotonic() - began < 30
    child = int(log.read_text().splitlines()[0])
    assert outcome == Outcome(False, "ended after 5 s", f"{child}\nalmost")
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_that_fails_says_its_last_lines(tmp_path: Path) -> None:
    code = "print(*range(100), sep='\\n'); raise SystemExit(3)"
    outcome = run_part(["-c", code], 60, tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[0] == "0", "the log has not all lines"
    assert (outcome.passed, outcome.how) == (False, "failed with 3")
    assert outcome.tail.splitlines()[-1] == "99"
    assert len(outcome.tail.splitlines()) == 25


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    """On a machine without a GPU, but for the part that needs none."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)),
            *("--only", "environment", "profile"),
        ],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 of 2 parts passed"
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["passed"] for part in told["parts"]] == [False, False]
    assert told["parts"][0]["rows"][0]["torch"], "what comes before the failure is lost"


def test_a_page_is_whole_after_each_row(tmp_path: Path) -> None:
    page = Page(tmp_path)
    page.start()
    page.begin("one", "The first")
    part = Page(tmp_path)  # in the part's process
    for row in ({"a": 1, "b": None}, {"a": 2, "b": "x|y"}, {"c": "z"}):
        part.tell(**row)
        told = json.loads((tmp_path / "gpu.json").read_text())
        assert told["parts"][-1]["rows"][-1] == row
    page.end(**asdict(Outcome(False, "failed with 1", "the tail")), seconds=2.0)
    page.close("0 of 1 parts passed")
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| a   |   b |",
        "| --- | --: |",
        "| 1   |     |",
        "| 2   | x/y |",
        "| c   |",
        "| --- |",
        "| z   |",
    ]
    assert "Failed with 1, 2.0 s." in lines
    assert "the tail" in lines
    assert lines[-1] == "0 of 1 parts passed"


def test_what_fails_in_a_row_is_told_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page(tmp_path)
    page.start()
    page.begin("one", "The first")
    with page.attempt(batch=1):
        int("no number\nand more")
    with page.attempt(batch=2):
        page.tell(batch=2, speed=3)
    assert "Traceback" in capsys.readouterr().err
    failed = "ValueError: invalid literal for int() with base 10: 'no number\\nand more'"
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["rows"]
    assert rows == [{"batch": 1, "failed": failed}, {"batch": 2, "speed": 3}]
    assert page.failures == 1


_CUDA_TESTS = """
import pytest
def test_one(): pass
def test_two(): assert 1 == 2
@pytest.mark.skip
def test_three(): pass
@pytest.fixture
def broken(): raise ValueError("broken")
def test_four(broken): pass
"""
_RUN_REPORTER = """
import sys
from pathlib import Path
import pytest
from benchmarks.gpu.cuda_tests import Reporter
from benchmarks.gpu.page import Page
folder = sys.argv[1]
page = Page(Path(folder))
page.start()
page.begin("tests", "The tests")
reporter = Reporter(page, float(sys.argv[2]))
pytest.main(["-p", "no:cacheprovider", "-c", "/dev/null", folder], plugins=[reporter])
print(dict(reporter.count), reporter.complete)
"""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ("60", "{'passed': 1, 'failed': 2, 'skipped': 1} True"),
        ("0", "{'passed': 1} False"),
    ],
)
def test_each_test_that_fails_is_told_until_time_runs_out(
    tmp_path: Path, seconds: str, told: str
) -> None:
    (tmp_path / "test_some.py").write_text(_CUDA_TESTS)
    done = subprocess.run(
        [*command(_RUN_REPORTER), str(tmp_path), seconds],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == told, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["rows"]
    failures = [(row["test"].partition("::")[2], row["message"]) for row in rows]
    expected = [("test_two", "assert 1 == 2"), ("test_four", "ValueError: broken")]
    assert failures == (expected if seconds == "60" else [])
