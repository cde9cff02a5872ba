"""Tests of the scorer's worker process: its protocol on stdin and stdout, and its imports."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.toxicity.scorer import ScoringError
from server.toxicity.worker import answer, load_scorer
from server.variables import WORKER_PARENT, WORKER_SPEC

ROOT = Path(__file__).parents[3]


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def score(self, texts: Sequence[str]) -> list[float]:
        raise self.error


class Recording:
    def __init__(self) -> None:
        self.texts: Sequence[str] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.texts = texts
        return [0.5] * len(texts)


WORKER = [sys.executable, "-m", "server.toxicity.worker"]


def environment(spec: str, parent: int) -> dict[str, str]:
    return {**os.environ, WORKER_SPEC.name: spec, WORKER_PARENT.name: str(parent)}


def run(spec: str, *lines: object) -> list[dict[str, object]]:
    """Send lines to a new worker and close its stdin; return the lines that it answered."""
    done = subprocess.run(
        WORKER,
        cwd=ROOT,
        env={**environment(spec, os.getpid()), "HF_HUB_OFFLINE": "1"},
        input="".join(json.dumps(line) + "\n" for line in lines),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (1 if "error" in said[0] else 0)
    return said


def test_the_protocol() -> None:
    ready, scores, empty, wrong, again = run(
        "embedded", ["You stupid asshole.", "two\nlines"], [], [1], ["Hello"]
    )
    assert ready == {"ready": True}
    assert isinstance(scores["scores"], list)
    assert [score > 0.5 for score in scores["scores"]] == [True, False]
    assert empty == {"scores": []}
    assert set(wrong) == {"error"}
    assert set(again) == {"scores"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [("none", "scores nothing"), ("bert", "'bert' is none of")],
)
def test_a_scorer_that_cannot_be_loaded_is_said(spec: str, says: str) -> None:
    (said,) = run(spec)
    assert says in str(said["error"])


def test_what_libraries_print_does_not_reach_the_protocol(tmp_path: Path) -> None:
    # This library prints when imported and when asked, by print, os.write and a child process.
    package = tmp_path / "profanity_check"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\n"
        "print('imported')\n"
        "def predict_prob(texts):\n"
        "    print('asked')\n"
        "    os.write(1, b'from below\\n')\n"
        "    os.system('echo from a child')\n"
        "    return [0.25] * len(texts)\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        WORKER,
        env={**environment("embedded", os.getpid()), **paths},
        input=b'["a", "b"]\n',
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == b'{"ready": true}\n{"scores": [0.25, 0.25]}\n'
    assert {b"imported", b"asked", b"from below", b"from a child"} <= set(done.stderr.splitlines())


@pytest.mark.parametrize("spec", ["embedded", "http://127.0.0.1:9"])
def test_only_the_chosen_backend_is_imported(spec: str) -> None:
    code = (
        "import sys\n"
        "from server.toxicity.worker import load_scorer\n"
        f"load_scorer({spec!r})\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'pydantic', 'server.metrics')"
        " if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True
    )
    assert done.stdout.strip() == b"[]"


def test_lone_surrogates_become_replacement_characters() -> None:
    scorer = Recording()
    line = rb'["\ud83d\ude42 \ud800x", "a\udc00", "\n\u0000"]'
    assert answer(scorer, line) == {"scores": [0.5] * 3}
    assert scorer.texts == ["🙂 �x", "a�", "\n\x00"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ScoringError("one\n  two"), "one two"),
        (ScoringError("x" * 9999), "x" * 500),
        # Errors of libraries may quote the texts, so only their type is told.
        (ValueError("SECRET"), "the toxicity scorer failed: ValueError"),
        (KeyError("SECRET"), "the toxicity scorer failed: KeyError"),
        (MemoryError(), "the toxicity scorer failed: MemoryError"),
    ],
)
def test_what_a_scorer_raises_is_one_short_line(error: Exception, message: str) -> None:
    assert answer(Failing(error), b'["a"]') == {"error": message}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError('one\\n  two')", "one two"),
        ("KeyError('x')", "KeyError: 'x'"),
        ("MemoryError", "MemoryError: MemoryError()"),
        ("RuntimeError('x' * 9999)", "RuntimeError: " + "x" * 486),
    ],
)
def test_what_loading_raises_is_said_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, message: str
) -> None:
    (tmp_path / "profanity_check.py").write_text(f"raise {error}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert run("embedded") == [{"error": message}]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends with its stdin")
def test_a_worker_whose_parent_has_ended_says_nothing() -> None:
    done = subprocess.run(
        WORKER,
        cwd=ROOT,
        env=environment("http://127.0.0.1:9", os.getppid()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_lines_that_are_no_lists_of_texts() -> None:
    for line in (b"{", b"1", b"[1]", b"null", b"\xff"):
        assert set(answer(Recording(), line)) == {"error"}


def test_none_is_no_scorer() -> None:
    with pytest.raises(ValueError, match="scores nothing"):
        load_scorer("none")
