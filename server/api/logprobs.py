"""Lists the tokens of a completion and of its prompt, as the API returns them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import JsonValue

from server.engine.output import ScoredToken, StepOutput, TokenLogprobs

LOWEST_LOGPROB: Final = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


@dataclass(frozen=True, slots=True)
class Listing:
    """Says what an answer tells of its tokens."""

    prompt: tuple[int, ...] = ()
    logprobs: int | None = None  # alternatives of each token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for each token of the prompt
    token_ids: bool = False  # whether the ids are listed, of the answer's and the prompt's tokens
    names_are_ids: bool = False  # whether a token is named `token_id:<id>`, and not by its text

    def name(self, token: ScoredToken) -> str:
        """Return what stands for a token in lists of log-probabilities."""
        return f"token_id:{token.token}" if self.names_are_ids else token.text

    def of_answer(self, token_ids: Sequence[int]) -> dict[str, JsonValue]:
        """Return vLLM's field `token_ids`, if it was asked for."""
        return {"token_ids": list(token_ids)} if self.token_ids else {}

    def of_prompt(self, scored: Sequence[TokenLogprobs]) -> dict[str, JsonValue]:
        """Return vLLM's fields `prompt_token_ids` and `prompt_logprobs`, those that were asked for.

        Args:
            scored: the prompt's tokens but the first, if they were scored.
        """
        fields: dict[str, JsonValue] = {}
        if self.token_ids:
            fields["prompt_token_ids"] = list(self.prompt)
        if (count := self.prompt_logprobs) is not None:
            fields["prompt_logprobs"] = [None, *(_by_id(token, count) for token in scored)]
        return fields


def _by_id(scored: TokenLogprobs, count: int) -> JsonValue:
    """Return a token and the best ones at its place, by their ids, as vLLM does."""
    ranked = [(scored.rank, scored.chosen)]
    ranked += [
        (rank, token)
        for rank, token in enumerate(scored.top[:count], start=1)
        if token.token != scored.chosen.token
    ]
    return {
        str(token.token): {
            "logprob": finite(token.logprob),
            "rank": rank,
            "decoded_token": token.text,
        }
        for rank, token in ranked
    }


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
