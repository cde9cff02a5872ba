"""Log-probabilities as the API tells them."""

from typing import Final

LOWEST_LOGPROB: Final = -9999.0  # JSON has no infinity; OpenAI's own stand-in


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)
