"""Tests of scoring a batch with bad texts in it, and a batch with a scorer that is down."""

from collections.abc import Sequence

import pytest

from server.toxicity.batches import MAX_FAILURES_IN_A_ROW, score_batch
from server.toxicity.scorer import ScoringError


class Picky:
    """Scores texts that are numbers; fails on "bad", and scores no text of a batch with "short"."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.asked.append(list(texts))
        for text in texts:
            if text.startswith("short"):
                return []
            if not text.isdigit():
                raise ValueError(text)
        return [int(text) / 100 for text in texts]


def outcome(texts: list[str]) -> list[float | None]:
    """Score texts with a new `Picky`; return the scores, with None for each text that failed."""
    results = score_batch(Picky(), texts)
    return [None if isinstance(result, ScoringError) else result for result in results]


def test_a_good_batch_is_asked_once() -> None:
    scorer = Picky()
    assert score_batch(scorer, ["1", "2"]) == [0.01, 0.02]
    assert scorer.asked == [["1", "2"]]


def test_bad_texts_cost_nobody_else_a_score() -> None:
    assert outcome(["1", "bad", "3"]) == [0.01, None, 0.03]
    assert outcome(["bad", "2", "bad", "4", "short", "6"]) == [None, 0.02, None, 0.04, None, 0.06]
    many = [str(n) for n in range(63)]
    assert outcome([*many, "bad"]) == [*(n / 100 for n in range(63)), None]


def test_a_scorer_that_is_down_is_not_asked_for_each() -> None:
    scorer = Picky()
    results = score_batch(scorer, ["bad"] * 64)
    assert len(results) == 64
    assert all(isinstance(result, ScoringError) for result in results)
    assert len(scorer.asked) == 1 + MAX_FAILURES_IN_A_ROW


@pytest.mark.parametrize(
    ("text", "says"), [("bad", "failed: ValueError$"), ("short", "0 scores for 1 texts")]
)
def test_one_text_is_asked_once_and_told_why(text: str, says: str) -> None:
    scorer = Picky()
    (result,) = score_batch(scorer, [text])
    assert scorer.asked == [[text]]
    assert isinstance(result, ScoringError)
    with pytest.raises(ScoringError, match=says):
        raise result
