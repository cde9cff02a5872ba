"""Incremental text of one sequence, and where it stops."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Tokens of the prompt that the first text may depend on: some decoders strip a first blank.
_CONTEXT = 6
# Tokens after which text is given even if it ends in the middle of a character: none is so long.
_PENDING = 8


class Detokenizer:
    """Turns token ids into text as they come; holds back what may yet be a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._context = 0  # the first token that the next text may depend on
        self._shown = len(self._tokens)  # tokens whose text was given
        # A character that the prompt began is whole in the completion that ends it.
        while self._shown and self._decode(self._tokens[: self._shown]).endswith("\ufffd"):
            self._shown -= 1
        self._held = ""
        self.stopped = False  # a stop string was found; nothing more will come

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        text = self._new_text()
        incomplete = not text or text.endswith("\ufffd")  # a character, it may be
        if incomplete and len(self._tokens) - self._shown < _PENDING:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return self._release(text)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._new_text())
        if not self.stopped:
            text += self._held
        self._held = ""
        return text

    def _new_text(self) -> str:
        """What the tokens that were not shown add to the text of those before them.

        The difference of two decodings, because a token's text depends on its neighbours
        (spaces, bytes of one character). tokenizers' own DecodeStream raises on byte-fallback
        tokens that are no character.
        """
        before = self._decode(self._tokens[self._context : self._shown])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
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
