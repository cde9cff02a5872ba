"""The embedded scorer: alt-profanity-check, a linear model over words.

It is a proxy for toxicity. It sees profanity; it does not see polite hate, irony or threats in
clean words, and it knows English only. Where the scores matter, use a classifier (`hf:`).
"""

from collections.abc import Sequence

from server.toxicity.scorer import ScoringError

try:
    from profanity_check import predict_prob  # type: ignore[import-untyped]
except ImportError as error:
    raise ScoringError(
        "the embedded toxicity scorer needs alt-profanity-check: install steerserve[embedded]"
    ) from error


class ProfanityScorer:
    """Scores texts by the probability that they are profane, in about 0.01 ms a text in batches."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `Backend.score`."""
        if not texts:
            return []  # scikit-learn takes no empty batch
        return [float(probability) for probability in predict_prob(list(texts))]


def load(_target: str) -> ProfanityScorer:
    """Return the scorer; there is only one, so that the target is not used."""
    return ProfanityScorer()
