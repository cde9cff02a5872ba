"""The text of tokens that come one after the other, and where in it each of them begins."""

from codecs import getincrementaldecoder, utf_8_decode
from collections.abc import Sequence
from itertools import islice
from typing import Final

from server.engine.torch.text.vocabulary import Vocabulary

# Tokens of a prompt that what follows may depend on: those that hold the bytes of an unfinished
# character, at most three, and one that is text by itself.
_CONTEXT: Final = 6


class RunningText:
    """Turns tokens into text, and keeps the bytes of a character until it is whole.

    Bytes that turn out to be no character become U+FFFD, as everywhere; those of a character that
    is unfinished at the end become nothing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._before: int | None = None  # the last token that is text by itself
        self._only_prompts = False  # whether an unfinished character has no bytes but the prompt's
        self.length = 0  # characters so far, an unfinished one not counted
        self.begin = 0  # the character in which the last token begins

    @classmethod
    def after(cls, vocabulary: Vocabulary, prompt: Sequence[int]) -> "RunningText":
        """Begin an empty text that goes on from a prompt, whose special tokens are left out.

        A character that the prompt begins and the text ends is the text's. If the text does not
        end it, its bytes are nobody's.
        """
        running = cls(vocabulary)
        last = islice(
            (token for token in reversed(prompt) if token not in vocabulary.special), _CONTEXT
        )
        for token in reversed(list(last)):
            running.push(token)
        running._only_prompts = True
        running.length = running.begin = 0
        return running

    def push(self, token: int) -> str:
        """Return what one more token adds: characters that are whole now, perhaps none."""
        data = self._vocabulary.added(token, self._before)
        broken = bool(data) and not _goes_on(self._unfinished, data)
        if broken and self._only_prompts:
            self._decoder.reset()
            broken = False
        text = self._decoder.decode(data)
        # Of what was broken off, a U+FFFD comes before the token.
        self.begin = self.length + broken
        self.length += len(text)
        self._only_prompts = self._only_prompts and not data
        if _is_text(data) and (data or self._before is None):
            self._before = token
        return text

    @property
    def _unfinished(self) -> bytes:
        return self._decoder.getstate()[0]


def _goes_on(unfinished: bytes, data: bytes) -> bool:
    """Tell whether data may be the next bytes of a character whose first ones are given."""
    if not unfinished:
        return True
    try:
        utf_8_decode(unfinished + data[:1], "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
