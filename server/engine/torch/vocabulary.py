"""What each token is by itself: its text and its bytes."""

import re
from typing import Final

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engine.base import ScoredToken, TokenLogprobs
from server.engine.torch.sampler import RowLogprobs

_BYTE_OF: Final = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece names single bytes


class Vocabulary:
    """A tokenizer's tokens, one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def logprobs(self, token: int, row: RowLogprobs) -> TokenLogprobs:
        """A row's log-probabilities, with the tokens' texts."""
        top = tuple(self.scored(other, value) for other, value in row.top)
        return TokenLogprobs(self.scored(token, row.sampled), top)

    def scored(self, token: int, logprob: float) -> ScoredToken:
        """A token with its log-probability."""
        text = self._text(token)
        if "\ufffd" not in text:
            return ScoredToken(text, text.encode(), logprob)
        # Part of a character: by its name, so that tokens stay distinct.
        name = self._tokenizer.id_to_token(token) or text
        return ScoredToken(name, _bytes(name), logprob)

    def _text(self, token: int) -> str:
        """What it adds to a text: some decoders strip the blank before the first token."""
        once, twice = (
            self._tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2)
        )
        added: str = twice[len(once) :]
        return added


def _bytes(name: str) -> bytes:
    """The bytes of a token whose name stands for bytes, by either of the usual spellings."""
    if spelled := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(spelled[1])
    if all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    return name.encode()
