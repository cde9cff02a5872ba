"""Log-probabilities as the API returns them."""

from typing import Final

LOWEST_LOGPROB: Final = -9999.0  # JSON has no infinity; OpenAI's own stand-in


def finite(logprob: float) -> float:
    """Return the log-probability, raised to LOWEST_LOGPROB if it is lower."""
    return max(logprob, LOWEST_LOGPROB)
