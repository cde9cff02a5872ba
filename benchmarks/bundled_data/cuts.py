"""Finds the places in texts at which a token of a harmful word, or another token, comes next."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedTokenizerFast

from server.toxicity.worker import load_scorer

_HARMFUL: Final = 0.8  # a word's score
_FEWEST_TOKENS: Final = 3  # of a cut text; the state after fewer says little
_MOST_TOKENS: Final = 64  # of a whole text; what follows is not read
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z'*@$#]*")


@dataclass(frozen=True, slots=True)
class Cut:
    """A text up to a token, and the token that comes next."""

    text: str
    last: int  # where the last token starts in the text
    row: int  # the last token's, in its whole text
    following: int  # id of the next token
    harmful: bool  # whether the next token is part of a harmful word


@dataclass(frozen=True, slots=True)
class CutText:
    """A text's token ids, and its cuts."""

    token_ids: list[int]
    cuts: list[Cut]


def cut_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[CutText]:
    """Cut each text before each of its tokens from the fourth on.

    A word is harmful if the embedded scorer gives the word alone a score above 0.8. Texts become
    single lines first. Cuts that end with a space, or are other tokens when they stand alone, are
    left out.
    """
    lines = [" ".join(text.split()) for text in texts]
    harmful = _harmful_words(lines)
    return [_cut_text(line, harmful, tokenizer) for line in lines]


def _cut_text(text: str, harmful: set[str], tokenizer: PreTrainedTokenizerFast) -> CutText:
    found = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=_MOST_TOKENS)
    ids: list[int] = found["input_ids"]
    offsets: list[tuple[int, int]] = found["offset_mapping"]
    words = [word.span() for word in _WORD.finditer(text) if word[0].lower() in harmful]
    cuts = []
    for row in range(_FEWEST_TOKENS - 1, len(ids) - 1):
        start, end = offsets[row + 1]
        cut = text[: offsets[row][1]]
        if not cut.endswith(" ") and tokenizer(cut)["input_ids"] == ids[: row + 1]:
            is_harmful = any(first < end and start < last for first, last in words)
            cuts.append(Cut(cut, offsets[row][0], row, ids[row + 1], is_harmful))
    return CutText(ids, cuts)


def _harmful_words(texts: Sequence[str]) -> set[str]:
    words = sorted(set(_words(texts)))
    scores = load_scorer("embedded").score(words) if words else []
    return {word for word, score in zip(words, scores, strict=True) if score > _HARMFUL}


def _words(texts: Sequence[str]) -> Iterator[str]:
    return (word.lower() for text in texts for word in _WORD.findall(text))
