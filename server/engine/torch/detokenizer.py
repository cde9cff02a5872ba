"""Incremental text of one sequence, and where it stops."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns token ids into text as they come; holds back what may yet be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._decoded = 0  # characters that the stream has given
        self._held = ""
        self.stopped = False  # a stop string was found; nothing more will come

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._decoded += len(piece)
        return self._release(piece)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.stopped:
            return ""
        # What the stream kept because a character was incomplete is shown as the tokenizer does.
        rest = self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._decoded :]
        text = self._release(rest)
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
