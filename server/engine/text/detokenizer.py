"""Turns one sequence's tokens into text incrementally, and finds where the text stops."""

from collections.abc import Sequence

from server.engine.text.running_text import RunningText
from server.engine.text.stop_strings import StopStrings
from server.engine.text.vocabulary import Vocabulary


class Detokenizer:
    """Turns token ids into text as they come; holds back what may yet be a stop string.

    Stop strings are looked for with and without the special tokens, even where the text has none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str],
        prompt: Sequence[int] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_special: frozenset[int] = frozenset(),
    ) -> None:
        """With `include_stop`, what ends the text is part of it."""
        self._vocabulary = vocabulary
        hidden = vocabulary.special if skip_special_tokens else frozenset[int]()
        self._hidden = hidden - shown_special
        self._shows_end = include_stop
        self._running = RunningText.continuing(vocabulary, prompt)
        self._stops = StopStrings(stop, include=include_stop)
        # The index of the text's character in which the last token begins. It is at least the
        # text's length if nothing of the token is in the text.
        self.offset = 0

    @property
    def stopped(self) -> bool:
        """True once a stop string was found; no more text will come."""
        return self._stops.found

    def push(self, token: int, *, ends: bool = False, may_stop: bool = True) -> str:
        """Return the text that is certain after one more token.

        Args:
            token: its id.
            ends: whether it is a token that ends the text. It adds nothing, unless what ends the
                text is asked for.
            may_stop: whether stop strings are looked for in its text.
        """
        if token in self._hidden or (ends and not self._shows_end):
            self.offset = self._running.length
            text, shown = self._vocabulary.text(token), False
        else:
            text, shown = self._running.push(token), True
            self.offset = self._running.token_start
        if may_stop:
            return self._stops.push(text, shown=shown)
        return text if shown else ""

    def finish(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        return self._stops.finish()
