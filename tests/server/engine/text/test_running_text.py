"""Tests the offsets of tokens in a text, where a character may take several tokens."""

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from server.engine.errors import InvalidRequestError
from server.engine.model.embedded import embedded_model_folder
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.prompts import Prompts
from server.engine.text.vocabulary import Vocabulary
from tests.tiny import tiny_tokenizer

TINY = tiny_tokenizer()


@pytest.fixture(scope="module")
def embedded() -> Prompts:
    """Make `Prompts` with the embedded model's tokenizer."""
    file = embedded_model_folder(print) / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))  # type: ignore[no-untyped-call]
    return Prompts(tokenizer, 1000)


def bytes_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> bytes:
    """Return the tokens' bytes, without special tokens."""
    return b"".join(
        vocabulary.with_logprob(token, 0).bytes
        for token in tokens
        if token not in vocabulary.special
    )


def unfinished(data: bytes) -> int:
    """Return how many bytes at the end may still become a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


def check_offsets(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> None:
    """Assert that a completion's text is its bytes decoded, and that its tokens' offsets are right.

    A token's text must begin at its offset in the completion's text.
    """
    vocabulary = Vocabulary(tokenizer)
    detokenizer = Detokenizer(vocabulary, (), prompt)
    pieces, offsets = [], []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        offsets.append(detokenizer.offset)
    text = "".join([*pieces, detokenizer.finish()])
    before, data = bytes_of(vocabulary, prompt), bytes_of(vocabulary, tokens)
    if not unfinished(before):
        whole = data[: len(data) - unfinished(data)]
        assert text == whole.decode(errors="replace")
    assert offsets == sorted(offsets)
    for place, (token, offset) in enumerate(zip(tokens, offsets, strict=True)):
        assert offset <= len(text)
        if token in vocabulary.special:
            continue
        visible = vocabulary.with_logprob(token, 0)
        try:
            visible.bytes.decode()
        except UnicodeDecodeError:
            # The token holds part of a character, so only an upper bound of its offset is known.
            some = bytes_of(vocabulary, tokens[: place + 1])
            assert offset <= len(some.decode(errors="replace"))
        else:
            assert text[offset:].startswith(visible.text)


# Tokens of bytes, among which letters and parts of characters of 2 to 4 bytes are frequent.
TINY_TOKENS = st.lists(
    st.one_of(
        st.sampled_from(TINY("a\u00e9\u20ac\U0001f600\ufffd")["input_ids"]), st.integers(0, 258)
    ),
    max_size=12,
)


# ED A9 begins a surrogate, which is invalid in UTF-8, so it decodes to two U+FFFD instead of one.
@example([], [169, 102, 64])
@example([], [169, 102, 102, 64])
@given(TINY_TOKENS, TINY_TOKENS)
def test_offsets_of_a_byte_a_token(prompt: list[int], tokens: list[int]) -> None:
    check_offsets(TINY.backend_tokenizer, prompt, tokens)


@pytest.mark.embedded
@given(st.data())
def test_offsets_of_the_embedded_models_tokens(embedded: Prompts, data: st.DataObject) -> None:
    tokenizer = embedded._tokenizer
    some = tokenizer.encode(" \U0001f600\U0001f389 \u4f60\u597d\u0301 <|im_end|> \ufffd").ids
    token = st.one_of(st.sampled_from(some), st.integers(0, tokenizer.get_vocab_size() - 1))
    tokens = st.lists(token, max_size=10)
    check_offsets(tokenizer, data.draw(tokens), data.draw(tokens))


# Texts that the embedded model's tokenizer has tokens for; it drops some other bytes.
KNOWN = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"]), max_size=12)


@pytest.mark.embedded
@given(KNOWN)
def test_a_texts_own_tokens_join_to_it(embedded: Prompts, text: str) -> None:
    tokenizer = embedded._tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    vocabulary = Vocabulary(tokenizer)
    detokenizer = Detokenizer(vocabulary, ())
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join([*pieces, detokenizer.finish()]) == text


def test_tokens_of_one_character_all_begin_where_it_does() -> None:
    detokenizer = Detokenizer(Vocabulary(TINY.backend_tokenizer), ())
    offsets = []
    for token in TINY("i \U0001f600\u00e9k")["input_ids"]:
        detokenizer.push(token)
        offsets.append(detokenizer.offset)
    assert offsets == [0, 1, 2, 2, 2, 2, 3, 3, 4]


# --- prompts ---


def check_description(prompts: Prompts, prompt: str | list[int]) -> None:
    """Assert that each token of a prompt begins at its offset in the echoed text."""
    described = prompts.describe_prompt(prompt)
    vocabulary = prompts._vocabulary
    assert len(described.offsets) == len(described.tokens)
    assert list(described.offsets) == sorted(described.offsets)
    for token, offset in zip(described.tokens, described.offsets, strict=True):
        assert offset <= len(described.text)
        scored = vocabulary.with_logprob(token, 0)
        if scored.text.encode() == scored.bytes:  # false for a part of a character
            assert described.text[offset:].startswith(scored.text)


@given(st.text(min_size=1, max_size=12))
def test_offsets_in_a_prompt_given_as_text(text: str) -> None:
    prompts = Prompts(TINY, 100)
    check_description(prompts, text)
    assert prompts.describe_prompt(text).text == text


@given(TINY_TOKENS.filter(bool))
def test_offsets_in_a_prompt_given_as_token_ids(tokens: list[int]) -> None:
    prompts = Prompts(TINY, 100)
    check_description(prompts, tokens)
    data = b"".join(prompts._vocabulary.with_logprob(token, 0).bytes for token in tokens)
    whole = data[: len(data) - unfinished(data)]
    assert prompts.describe_prompt(tokens).text == whole.decode(errors="replace")


@pytest.mark.embedded
@given(KNOWN.filter(bool))
def test_offsets_in_a_prompt_of_the_embedded_model(embedded: Prompts, text: str) -> None:
    prompts = embedded
    described = prompts.describe_prompt(text)
    assert described.text == text
    check_description(prompts, text)
    assert prompts.describe_prompt(described.tokens).text == text
    assert prompts.describe_prompt(described.tokens).offsets == described.offsets


def test_a_tokenizer_that_leaves_blanks_out_of_its_spans_and_adds_tokens() -> None:
    """The tokenizer's settings are those of GPT-2's and Llama 3's."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<bos> $A <eos>",
                special_tokens=[(name, backend.token_to_id(name)) for name in ("<bos>", "<eos>")],
            ),
        ]
    )
    described = Prompts(tokenizer, 100).describe_prompt("a b\u00e9")
    assert described.offsets == (0, 0, 1, 2, 3, 3, 4)
    assert described.text == "a b\u00e9"
    assert described.first_token == "<bos>"


def test_a_prompt_that_ends_within_a_character_is_told_without_it() -> None:
    prompts = Prompts(tiny_tokenizer(), 100)
    tokens = prompts.tokenize("a\u20ac")[:-1]
    described = prompts.describe_prompt(tokens)
    assert (described.text, described.offsets) == ("a", (0, 1, 1))
    replaced = prompts.describe_prompt(prompts.tokenize("\ufffd"))
    assert (replaced.text, replaced.offsets) == ("\ufffd", (0, 0, 0))
    assert (
        prompts.describe_prompt(tokens[1:]).first_token == "\u00e2"
    )  # the byte-level name of byte E2


def test_what_cannot_be_served_is_not_spelled() -> None:
    prompts = Prompts(tiny_tokenizer(), 10)
    with pytest.raises(InvalidRequestError, match="maximum context length is 10") as refused:
        prompts.describe_prompt([1] * 11)
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(InvalidRequestError, match="empty"):
        prompts.describe_prompt("")
