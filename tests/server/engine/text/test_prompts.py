"""Tests the conversion of texts and conversations to token ids."""

import pytest

from server.engine.chat import Conversation
from server.engine.errors import InvalidRequestError
from server.engine.text.prompts import Prompts
from tests.tiny import tiny_tokenizer


def test_a_tokenizers_own_truncation_and_padding_are_undone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    prompts = Prompts(tokenizer, max_tokens=100)
    assert len(prompts.tokenize("0123456789")) == 10


def test_what_cannot_fit_is_refused_without_being_tokenized() -> None:
    prompts = Prompts(tiny_tokenizer(), max_tokens=10)
    longest = max(map(len, tiny_tokenizer().get_vocab()))
    assert prompts.max_characters == 10 * longest
    assert len(prompts.tokenize("x" * prompts.max_characters)) == prompts.max_characters
    with pytest.raises(InvalidRequestError, match="maximum context length is 10") as refused:
        prompts.tokenize("x" * (prompts.max_characters + 1))
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


def test_a_conversation_is_bounded_as_its_template_renders_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    prompts = Prompts(tokenizer, max_tokens=10)
    long = {"role": "user", "content": "x" * 1000}
    short = {"role": "user", "content": "ab"}
    assert len(prompts.read_chat(Conversation((long, short))).tokens) == 2
    with pytest.raises(InvalidRequestError, match="maximum context length is 10") as refused:
        prompts.read_chat(Conversation((short, long)))
    assert refused.value.param == "messages"


def test_text_and_tokens() -> None:
    prompts = Prompts(tiny_tokenizer(), max_tokens=100)
    assert prompts.detokenize(prompts.tokenize("héllo")) == "héllo"
