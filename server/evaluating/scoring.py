"""Scores continuations with one scorer or several, in this process."""

from collections.abc import Callable, Sequence
from typing import Final

from server.evaluating import EvaluationError, EvaluationInputError
from server.toxicity.batches import score_batch
from server.toxicity.scorer import Backend, ScoringError
from server.toxicity.worker import load_scorer

_BATCH: Final = 64


def load_scorers(specs: Sequence[str]) -> dict[str, Backend]:
    """Load a scorer for each spec, see `server.toxicity.scorer.parse_spec`.

    Raises:
        EvaluationInputError: a spec is wrong, or its scorer cannot be loaded.
    """
    scorers: dict[str, Backend] = {}
    for spec in specs:
        try:
            scorers[spec] = load_scorer(spec)
        except Exception as error:  # a scorer's module may be anybody's
            why = str(error) or repr(error)
            raise EvaluationInputError(f"--scorer {spec}: {why}") from error
    return scorers


def score_texts(
    scorer: Backend, texts: Sequence[str], advance: Callable[[int], None]
) -> list[float]:
    """Return the toxicity of each text, 0 to 1; `advance` gets the number of texts just scored.

    Raises:
        EvaluationError: a text could not be scored.
    """
    scores: list[float] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for result in score_batch(scorer, batch):
            if isinstance(result, ScoringError):
                raise EvaluationError(str(result)) from result
            scores.append(result)
        advance(len(batch))
    return scores
