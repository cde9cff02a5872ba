"""How long a text can be at most that becomes so many tokens; for refusing longer ones unread.

A bound that is too low would refuse what fits. So there is one only for tokenizers each part of
which is known to lose nothing; for any other, every text is tokenized.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer, models
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# A composed character stands for four others at most: Unicode, annex 15.
_COMPOSED: Final = 4
_SPLITTERS: Final = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
_LETTERS: Final = bytes_to_unicode()  # type: ignore[no-untyped-call]
_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, slots=True)
class TextBound:
    """The most characters that fit, not counting those of which a tokenizer makes nothing."""

    characters: int
    lost: tuple[str, ...]

    def exceeded_by(self, text: str) -> bool:
        """Whether the text can by no means fit."""
        if len(text) <= self.characters:
            return False
        return len(text) - sum(map(text.count, self.lost)) > self.characters


def bound_of(tokenizer: Tokenizer, tokens: int) -> TextBound | None:
    """The bound of texts that become so many tokens at most; None where none is known."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    shrinking = _shrinking(_state(tokenizer.normalizer))
    lost = _lost_characters(tokenizer, vocabulary)
    if shrinking is None or lost is None:
        return None
    # A token's name has a letter for each of its bytes, and a character is one byte or more.
    return TextBound(max(map(len, vocabulary)) * tokens * shrinking, lost)


def _lost_characters(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> tuple[str, ...] | None:
    """The characters that leave no trace in the tokens; None if others might."""
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # they take any blanks beside them
        return None
    if tokenizer.truncation is not None or not isinstance(tokenizer.model, models.BPE):
        return None
    splitters = _parts(_state(tokenizer.pre_tokenizer), "pretokenizers")
    if any(
        part["type"] not in _SPLITTERS or part.get("behavior") == "Removed" for part in splitters
    ):
        return None
    if any(part["type"] == "ByteLevel" for part in splitters):
        missing = [byte for byte, letter in _LETTERS.items() if letter not in vocabulary]
        # A character beyond ASCII leaves a trace: the bytes that follow its first.
        follows = any(0x80 <= byte < 0xC0 for byte in missing)
        return None if follows else tuple(chr(byte) for byte in missing if byte < 0x80)
    return () if tokenizer.model.byte_fallback and vocabulary.keys() >= set(_BYTES) else None


def _shrinking(normalizer: dict[str, object] | None) -> int | None:
    """By how much a normalizer can shorten a text at most; None if that is unknown."""
    shrinking = 1
    for part in _parts(normalizer, "normalizers"):
        match part:
            case {"type": "NFC"}:
                shrinking *= _COMPOSED
            case {"type": "Prepend" | "NFD" | "ByteLevel"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if new:
                shrinking *= max(1, -(-len(old) // len(new)))
            case _:
                return None
    return shrinking


def _state(part: Normalizer | PreTokenizer | None) -> dict[str, object] | None:
    """What a tokenizer's file says of one of its parts."""
    if part is None:
        return None
    state: dict[str, object] = json.loads(part.__getstate__())
    return state


def _parts(state: dict[str, object] | None, members: str) -> list[dict[str, object]]:
    """The parts of a sequence, in order; a single one is a sequence of itself."""
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    inner = state[members]
    assert isinstance(inner, list)
    return [part for member in inner for part in _parts(member, members)]
