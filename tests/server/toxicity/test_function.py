"""Tests of the scorer that calls a function of the operator's."""

from pathlib import Path

import numpy as np
import pytest

from server.toxicity.function import load
from server.toxicity.scorer import ScoringError
from server.toxicity.worker import load_scorer

MODULE = """
import numpy

def by_length(texts):
    return numpy.array([min(len(text), 10) / 10 for text in texts], dtype=numpy.float32)

def wrong(texts):
    return [2.0] * len(texts)

def too_few(texts):
    return []

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module with functions into a folder of the import path; return its name."""
    (tmp_path / "own_scorers.py").write_text(MODULE)
    (tmp_path / "broken_scorers.py").write_text("import missing_module_of_nobody\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_scorers"


def test_a_function_scores(module: str) -> None:
    scores = load_scorer(f"python:{module}:by_length").score(["", "12345", "1" * 20])
    assert scores == [0.0, 0.5, 1.0]
    assert not any(isinstance(score, np.generic) for score in scores)


def test_wrong_answers_are_errors(module: str) -> None:
    for name in ("wrong", "too_few"):
        with pytest.raises(ScoringError, match="the toxicity scorer gave"):
            load(f"{module}:{name}").score(["a"])


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("no_such_module_of_anybody:f", "cannot import"),
        ("own_scorers:missing", "has no function 'missing'"),
        ("own_scorers:number", "has no function 'number'"),
        ("broken_scorers:f", "missing_module_of_nobody"),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_imported_is_said(target: str, named: str) -> None:
    with pytest.raises(ScoringError, match=named):
        load(target)
