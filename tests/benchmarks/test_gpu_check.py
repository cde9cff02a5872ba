"""`make gpu-check`: all of it on the CPU, without what serves; and parts that fail or get stuck."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import cuda_tests, parts
from benchmarks.gpu.page import Page
from benchmarks.gpu.parts import PARTS, ROOT, Outcome, Part, run_part
from benchmarks.gpu.rows import Row, Rows, read_row

# What a bare machine lacks, and what this environment has beside it.
_LACKING = (
    *("pydantic", "pydantic_settings", "fastapi", "starlette", "typer", "httpx", "uvicorn"),
    *("pytest_asyncio", "pytest_timeout", "hypothesis", "prometheus_client"),
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


def test_a_part_that_is_stuck_is_ended_with_all_that_it_has_started() -> None:
    code = (
        "import subprocess, sys, time; print('ROW {\"a\": 1}', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('almost', flush=True); time.sleep(60)"
    )
    rows: list[Row] = []
    began = time.monotonic()
    outcome = run_part(command(code), 2.0, rows.append, io.StringIO())
    assert time.monotonic() - began < 20
    assert outcome == Outcome(False, "ended after 2 s", "almost")
    assert rows == [{"a": 1}]


def test_a_part_that_fails_says_its_last_lines() -> None:
    rows: list[Row] = []
    code = "print('ROW {\"a\": 1}', flush=True); print(*range(100), sep='\\n'); raise SystemExit(3)"
    log = io.StringIO()
    outcome = run_part(command(code), 60, rows.append, log)
    assert log.getvalue().splitlines()[1] == "0", "the log has not all lines"
    assert (outcome.passed, outcome.how) == (False, "failed with 3")
    assert outcome.tail.splitlines()[-1] == "99"
    assert len(outcome.tail.splitlines()) == 25
    assert rows == [{"a": 1}]


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
    page = Page(tmp_path, "a command")
    page.begin(Part("one", "The first", 1.0))
    rows: list[Row] = [{"a": 1, "b": None}, {"a": 2, "b": "x|y"}, {"c": "z"}]
    for row in rows:
        page.row(row)
        told = json.loads((tmp_path / "gpu.json").read_text())
        assert told["parts"][-1]["rows"][-1] == row
    page.end(Outcome(False, "failed with 1", "the tail"), 2.0)
    page.close("0 of 1 parts passed")
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "| 2 | x/y |",
        "| c |",
        "| --- |",
        "| z |",
    ]
    assert "the tail" in lines
    assert lines[-1] == "0 of 1 parts passed"


def test_what_fails_in_a_row_is_told_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(sys.stdout)
    with rows.attempt(batch=1):
        int("no number\nand more")
    with rows.attempt(batch=2):
        rows.tell(batch=2, speed=3)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Traceback") for line in lines)
    told = [row for line in lines if (row := read_row(line)) is not None]
    failed = "ValueError: invalid literal for int() with base 10: 'no number\\nand more'"
    assert told == [{"batch": 1, "failed": failed}, {"batch": 2, "speed": 3}]
    assert rows.failures == 1
    assert read_row("nothing of ours") is None


def test_each_test_that_fails_is_told_when_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "tests/cuda/test_a.py::test_one[llama-0 1] PASSED   [ 10%]",
        "tests/cuda/test_a.py::test_two FAILED              [ 20%]",
        "tests/cuda/test_a.py::test_three SKIPPED (no)      [ 30%]",
        "tests/cuda/test_a.py::test_four ERROR              [ 40%]",
        "something else PASSED",
        "FAILED tests/cuda/test_a.py::test_two - assert 1 == 2",
    ]
    count = cuda_tests._follow([f"{line}\n" for line in lines], Rows(sys.stdout))
    assert count == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1, "ERROR": 1}
    out = capsys.readouterr().out.splitlines()
    told = [row for line in out if (row := read_row(line)) is not None]
    assert [(row["test"], row["message"]) for row in told] == [
        ("tests/cuda/test_a.py::test_two", None),
        ("tests/cuda/test_a.py::test_four", None),
        ("tests/cuda/test_a.py::test_two", "assert 1 == 2"),
    ]


def test_the_path_to_import_from_keeps_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    assert list(parts._python_path()) == [str(ROOT), "/given"]
