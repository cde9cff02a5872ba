"""Lists a completion's tokens with their log-probabilities, as the API returns them."""

from dataclasses import dataclass, field
from typing import Final

from server.engine.base import StepOutput, TokenLogprobs

LOWEST_LOGPROB: Final = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


@dataclass(slots=True)
class ListedTokens:
    """Lists a completion's tokens as their text is returned.

    A token whose text is held back is listed when its text is returned. If a completion stops, the
    tokens after its text are left out: the end token, and the tokens of a stop string. If it
    reaches its length limit, all tokens are listed, also those at the end that add no text.
    """

    _waiting: list[TokenLogprobs] = field(default_factory=list)
    _length: int = 0  # characters of the text that was returned

    def take(self, output: StepOutput) -> list[TokenLogprobs]:
        """Return the tokens to list after one more step."""
        self._waiting.extend(output.logprobs)
        self._length += len(output.text)
        count = len(self._waiting)
        if output.finish_reason != "length":
            count = sum(token.offset < self._length for token in self._waiting)
        listed = self._waiting[:count]
        del self._waiting[:count]
        return listed


def finite(logprob: float) -> float:
    """Return the log-probability, raised to LOWEST_LOGPROB if it is lower."""
    return max(logprob, LOWEST_LOGPROB)
