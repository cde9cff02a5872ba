"""A text is refused unread only where it cannot fit by any means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.engine.torch.text_bound import bound_of

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from(" \t\n\x04e\u0301\u03b1\u0345"))


def byte_level(*missing: str) -> Tokenizer:
    """A token a byte, but for some, and one of five letters."""
    names = [letter for letter in ALPHABET if letter not in missing]
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "a")]
    names += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def composing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("ab", "c"), normalizers.Prepend("x")]
    )
    return tokenizer


def falling_back() -> Tokenizer:
    names = ("\u2581", "a", "\u2581a", *BYTES)
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    return tokenizer


def splitting(behavior: str) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", behavior), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return tokenizer


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    return tokenizer


BOUNDED = {
    "bytes": (byte_level(), 5),
    "some": (byte_level("\u0104", "\u00f1"), 5),  # for the bytes 4 and F1
    "composing": (composing(), 5 * 4 * 2),
    "fallback": (falling_back(), 6),
    "split": (splitting("isolated"), 5),
    "added": (with_token(AddedToken("<special>")), 9),
}
UNBOUNDED = {
    "removed": splitting("removed"),
    "blanks": with_token(AddedToken("<special>", rstrip=True)),
    "truncating": truncating(),
    "continuation": byte_level("\u0122"),  # for the byte 80
    "words": Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")),
    "unknown": Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
}


@pytest.mark.parametrize(("tokenizer", "letters"), BOUNDED.values(), ids=BOUNDED)
def test_the_longest_token_bounds(tokenizer: Tokenizer, letters: int) -> None:
    bound = bound_of(tokenizer, 100)
    assert bound is not None
    assert bound.characters == letters * 100
    assert not bound.exceeded_by("b" * letters * 100)
    assert bound.exceeded_by("b" * (letters * 100 + 1))


@pytest.mark.parametrize("tokenizer", UNBOUNDED.values(), ids=UNBOUNDED)
def test_where_anything_may_be_lost_nothing_is_refused(tokenizer: Tokenizer) -> None:
    assert bound_of(tokenizer, 1) is None


def test_characters_that_leave_no_token_do_not_count() -> None:
    tokenizer, letters = BOUNDED["some"]
    bound = bound_of(tokenizer, 1)
    assert bound is not None
    text = "\x04" * 1000 + "a" * letters
    assert len(tokenizer.encode(text).ids) == 1
    assert not bound.exceeded_by(text)
    assert bound.exceeded_by(text + "a")


@pytest.mark.parametrize("name", BOUNDED)
@given(text=TEXTS)
def test_no_text_that_fits_is_refused(name: str, text: str) -> None:
    tokenizer, _ = BOUNDED[name]
    bound = bound_of(tokenizer, len(tokenizer.encode(text).ids))
    assert bound is not None
    assert not bound.exceeded_by(text)
