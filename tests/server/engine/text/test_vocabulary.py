"""Tests the text and bytes of single tokens, in SentencePiece and byte-level vocabularies."""

import pytest
from tokenizers import Tokenizer, decoders, models

from server.engine.text.vocabulary import Vocabulary
from tests.tiny import tiny_tokenizer


def sentencepiece() -> Tokenizer:
    """Return a tokenizer like Llama 2's and Gemma's: \u2581 for a space, <0x..> for a byte."""
    words = ["\u2581the", "cat", "<0xC3>", "<0xA9>", "\u2581", "\u2581\ufffd"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("token", "text", "data"),
    [
        (0, " the", b" the"),  # keeps the space, although a decoder strips it at a text's beginning
        (1, "cat", b"cat"),
        (2, "<0xC3>", b"\xc3"),
        (3, "<0xA9>", b"\xa9"),
        (4, " ", b" "),
        (5, " \ufffd", b" \xef\xbf\xbd"),  # the vocabulary's own replacement character
        (6, "", b""),  # an id without a token
    ],
)
def test_tokens_of_sentencepiece(token: int, text: str, data: bytes) -> None:
    scored = Vocabulary(sentencepiece()).with_logprob(token, -0.5)
    assert (scored.text, scored.bytes, scored.logprob) == (text, data, -0.5)


def test_every_token_of_a_byte_level_vocabulary_is_its_byte() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    vocabulary = Vocabulary(tokenizer)
    found = [vocabulary.with_logprob(token, 0) for token in range(256)]
    assert {token.bytes for token in found} == {bytes([byte]) for byte in range(256)}
    assert len({token.text for token in found}) == 256, "tokens cannot be told apart"
    for token in found:
        if token.bytes.isascii():
            assert token.text == token.bytes.decode()


def test_the_bytes_of_tokens_join_to_the_text() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("na\u00efve \u4f60\u597d")["input_ids"]
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    joined = b"".join(vocabulary.with_logprob(token, 0).bytes for token in ids)
    assert joined.decode() == "na\u00efve \u4f60\u597d"


def test_a_special_token_is_its_name() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    eos = tokenizer.token_to_id("<eos>")
    assert eos is not None
    scored = Vocabulary(tokenizer).with_logprob(eos, 0)
    assert (scored.text, scored.bytes) == ("<eos>", b"<eos>")


def test_the_special_tokens_are_known() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.add_tokens(["<think>"])  # an added token that is not special
    names = {tokenizer.id_to_token(token) for token in Vocabulary(tokenizer).special}
    assert names == {"<eos>", "<bos>", "<pad>"}
