"""Turns one sequence's tokens into text incrementally, and finds where the text stops."""

from collections.abc import Sequence

from server.engine.text.running_text import RunningText
from server.engine.text.stop_strings import StopStrings
from server.engine.text.vocabulary import Vocabulary


class Detokenizer:
    """Turns token ids into text as they come; holds back what may yet be a stop string.

    Special tokens are not in the text, but stop strings are looked for with and without them.
    """

    def __init__(
        self, vocabulary: Vocabulary, stop: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        self._vocabulary = vocabulary
        self._running = RunningText.continuing(vocabulary, prompt)
        self._stops = StopStrings(stop)
        # The index of the text's character in which the last token begins. It is at least the
        # text's length if nothing of the token is in the text.
        self.offset = 0

    @property
    def stopped(self) -> bool:
        """True once a stop string was found; no more text will come."""
        return self._stops.found

    def push(self, token: int, *, ends: bool = False) -> str:
        """Return the text that is certain after one more token.

        Args:
            token: its id.
            ends: whether it is an end-of-sequence token, which ends the text and adds nothing.
        """
        if ends or token in self._vocabulary.special:
            self.offset = self._running.length
            return self._stops.push(self._vocabulary.text(token), shown=False)
        text = self._running.push(token)
        self.offset = self._running.token_start
        return self._stops.push(text, shown=True)

    def finish(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        return self._stops.finish()
