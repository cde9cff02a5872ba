"""From the settings to a scorer."""

import pytest

from server.config import ConfigurationError, Settings
from server.toxicity.build import build_scorer


def test_none_is_no_scorer() -> None:
    assert build_scorer(Settings(toxicity_scorer="none")) is None


def test_a_scorer_is_started() -> None:
    scorer = build_scorer(Settings(toxicity_scorer="http://127.0.0.1:9"))
    assert scorer is not None
    try:
        scorer.wait_ready()
    finally:
        scorer.close()


def test_a_process_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ConfigurationError, match=r"cannot be started: .*/nowhere/python"):
        build_scorer(Settings(toxicity_scorer="embedded"))
