"""Turns a stream of tokens into text, and tells where in the text each token begins."""

from codecs import getincrementaldecoder, utf_8_decode
from collections.abc import Sequence
from itertools import islice
from typing import Final

from server.engine.text.vocabulary import Vocabulary

# How many of a prompt's last tokens are read, because the text that follows may depend on them. At
# most three hold the bytes of an unfinished character, and the one before them is text by itself.
# Two more are read, in case some of these add no bytes.
_CONTEXT: Final = 6


class RunningText:
    """Turns tokens into text, and holds back the bytes of a character until it is complete.

    Bytes that turn out to be no character become U+FFFD. The bytes of a character that is
    unfinished at the end are dropped.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = getincrementaldecoder("utf-8")("replace")
        # The last token whose bytes are text by themselves.
        self._last_text_token: int | None = None
        # True if all bytes of an unfinished character come from the prompt.
        self._is_from_prompt = False
        self.length = 0  # characters so far, an unfinished one not counted
        self.token_start = 0  # the index of the character in which the last token begins

    @classmethod
    def continuing(cls, vocabulary: Vocabulary, prompt: Sequence[int]) -> "RunningText":
        """Return an empty text that continues a prompt. The prompt's special tokens are ignored.

        A character that the prompt begins and the text completes belongs to the text. If the text
        does not complete it, its bytes are dropped.
        """
        running = cls(vocabulary)
        last = islice(
            (token for token in reversed(prompt) if token not in vocabulary.special), _CONTEXT
        )
        for token in reversed(list(last)):
            running.push(token)
        running._is_from_prompt = True
        running.length = running.token_start = 0
        return running

    def push(self, token: int) -> str:
        """Add a token, and return the characters that are complete now, perhaps none."""
        data = self._vocabulary.added_bytes(token, self._last_text_token)
        broken = b""
        if data and not _continues(self._unfinished, data):
            if self._is_from_prompt:
                self._decoder.reset()
            else:
                broken = self._unfinished
        text = self._decoder.decode(data)
        # If the token breaks off an unfinished character, U+FFFD precedes the token: once, or once
        # for each byte where the first bytes could have begun a surrogate only.
        self.token_start = self.length + len(broken.decode(errors="replace"))
        self.length += len(text)
        self._is_from_prompt = self._is_from_prompt and not data
        if _is_text(data) and (data or self._last_text_token is None):
            self._last_text_token = token
        return text

    @property
    def _unfinished(self) -> bytes:
        return self._decoder.getstate()[0]


def _continues(unfinished: bytes, data: bytes) -> bool:
    """Return whether `data` can continue the character whose first bytes are `unfinished`."""
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
