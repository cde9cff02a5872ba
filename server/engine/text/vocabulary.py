"""Gives the text and the bytes of single tokens."""

import re
from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engine.output import ScoredToken, TokenLogprobs

_BYTE_OF: Final = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")  # as SentencePiece names single bytes


class Vocabulary:
    """Gives the text and the bytes of a tokenizer's tokens. Used from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens that a completion's text leaves out, such as a chat template's marks.
        self.special: Final = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )

    def logprobs(
        self, token: int, logprob: float, top: Iterable[tuple[int, float]], rank: int
    ) -> TokenLogprobs:
        """Return a token's log-probability and those of the likeliest tokens, with their texts."""
        likeliest = tuple(self.with_logprob(other, value) for other, value in top)
        return TokenLogprobs(self.with_logprob(token, logprob), likeliest, rank)

    def with_logprob(self, token: int, logprob: float) -> ScoredToken:
        """Return a token with its log-probability."""
        data = self.added_bytes(token, token)
        try:
            return ScoredToken(token, data.decode(), data, logprob)
        except UnicodeDecodeError:
            # The token is part of a character; its name keeps it distinct from other parts.
            name = self._tokenizer.id_to_token(token) or ""
            return ScoredToken(token, name, data, logprob)

    def text(self, token: int) -> str:
        """Return the text that a token adds inside a text; U+FFFD for a part of a character."""
        return self.added_bytes(token, token).decode(errors="replace")

    def added_bytes(self, token: int, before: int | None) -> bytes:
        """Return the bytes that a token adds to a text in UTF-8.

        Args:
            token: its id; one that the tokenizer does not know adds nothing.
            before: the token that the text ends with, which must be text by itself. None where
                the text is empty: some decoders strip the blank that a text begins with.
        """
        context = [] if before is None else [before]
        text = self._decode([*context, token])[len(self._decode(context)) :]
        if "\ufffd" not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        # A decoder writes U+FFFD for bytes that are no character. A token whose name contains
        # U+FFFD stands for that character itself, though.
        return text.encode() if "\ufffd" in name else _bytes(name)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text


def _bytes(name: str) -> bytes:
    """Return the bytes that a token's name spells, as SentencePiece or as GPT-2 spells bytes."""
    if spelled := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(spelled[1])
    if all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    return name.encode()
