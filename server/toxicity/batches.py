"""Scores a batch so that one bad text does not fail the others."""

from collections.abc import Sequence
from typing import Final, TypeAlias

from server.toxicity.scorer import Backend, ScoringError

Result: TypeAlias = float | ScoringError

# One text may fail by its own fault; if so many fail in a row, the scorer is down.
MAX_FAILURES_IN_A_ROW: Final = 2


def score_batch(scorer: Backend, texts: Sequence[str]) -> list[Result]:
    """Return the score of each text, or the error for which it has none.

    If the batch fails, its texts are scored one by one, so that one bad text does not cost the
    others their scores. A scorer that is down must not be asked for long, so after
    MAX_FAILURES_IN_A_ROW failed texts the rest get the last error without being tried.
    """
    try:
        return [*_score(scorer, texts)]
    except ScoringError as error:
        return _one_by_one(scorer, texts) if len(texts) > 1 else [error]


def _one_by_one(scorer: Backend, texts: Sequence[str]) -> list[Result]:
    results: list[Result] = []
    failures = 0
    for text in texts:
        try:
            results += _score(scorer, [text])
            failures = 0
        except ScoringError as error:
            results.append(error)
            failures += 1
            if failures == MAX_FAILURES_IN_A_ROW:
                return results + [error] * (len(texts) - len(results))
    return results


def _score(scorer: Backend, texts: Sequence[str]) -> list[float]:
    """Score texts; any fault becomes a ScoringError, so that it does not end the thread."""
    try:
        scores = scorer.score(texts)
    except ScoringError:
        raise
    except Exception as error:
        # Only the error's type is told, because its message may quote a text.
        raise ScoringError(f"the toxicity scorer failed: {type(error).__name__}") from error
    if len(scores) != len(texts):
        raise ScoringError(f"the toxicity scorer gave {len(scores)} scores for {len(texts)} texts")
    return scores
