"""A batch whose texts fail for themselves alone."""

from collections.abc import Sequence
from typing import Final, TypeAlias

from server.toxicity.scorer import Backend, ScoringError

Result: TypeAlias = float | ScoringError

# One text that fails may be at fault itself. When so many fail in a row, the scorer is.
DOWN_AFTER: Final = 2


def score_batch(scorer: Backend, texts: Sequence[str]) -> list[Result]:
    """The score of each text, or why it has none.

    If the batch fails, its texts are scored one by one, so that one bad text costs nobody else its
    score. A scorer that is down must not be asked for long, though: once DOWN_AFTER texts in a row
    have failed, so have the rest, unasked, with the last error.
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
            if failures == DOWN_AFTER:
                return results + [error] * (len(texts) - len(results))
    return results


def _score(scorer: Backend, texts: Sequence[str]) -> list[float]:
    """Raises ScoringError whatever goes wrong: one fault must not end the thread."""
    try:
        scores = scorer.score(texts)
    except ScoringError:
        raise
    except Exception as error:
        # Its type only: what it says may quote a text.
        raise ScoringError(f"the toxicity scorer failed: {type(error).__name__}") from error
    if len(scores) != len(texts):
        raise ScoringError(f"the toxicity scorer gave {len(scores)} scores for {len(texts)} texts")
    return scores
