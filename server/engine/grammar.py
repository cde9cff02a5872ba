"""The compiled grammar of a request's answers, and how far an answer has come in it."""

from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher

from server.engine.errors import InvalidRequestError

SHOWN: Final = 300  # characters of a compiler's message that an error shows


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """A grammar that llguidance has compiled. Used from any thread; nothing in it changes."""

    lark: str  # in llguidance's dialect
    field: str  # the request's field that asks for it; errors name it
    matcher: LLMatcher

    def begin(self) -> "GrammarState":
        """Return the state of an answer that has no tokens yet."""
        return GrammarState(self.matcher.deep_copy(), self.field)


class GrammarState:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: LLMatcher, field: str) -> None:
        self._matcher = matcher
        self._field = field

    def mask(self) -> bytes:
        """Return the tokens that may come next: bit i % 8 of byte i // 8 is set for token i.

        End tokens may come where the answer may end.

        Raises:
            InvalidRequestError: to tell takes more work than is allowed for a token.
        """
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def completed_by(self, token: int) -> bool:
        """Append a token, which may come next, and tell whether nothing may follow it.

        Raises:
            InvalidRequestError: to tell takes more work than is allowed for a token.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            fault = self._matcher.get_error().partition("\n")[0][:SHOWN]
            raise refused(self._field, f"an answer cannot be followed any more: {fault}")


def refused(field: str, fault: str) -> InvalidRequestError:
    """Return the error for a structure that cannot be had."""
    field = field[:200]
    return InvalidRequestError(f"'{field}' cannot be used: {fault}", field, "invalid_structure")
