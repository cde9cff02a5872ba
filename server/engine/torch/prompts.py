"""From texts and conversations to token ids, and back. Used from any thread."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from server.engine.base import InvalidRequestError


class Prompts:
    """A tokenizer and its chat template, for a context of `max_tokens`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
        self._chat = tokenizer
        self._tokenizer = tokenizer.backend_tokenizer
        # Either may come with a tokenizer's file, and would change prompts in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_tokens = max_tokens
        # A token stands for no more characters than its name has.
        self.max_characters = max_tokens * max(map(len, self._tokenizer.get_vocab()))

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequestError: the text is much too long.
        """
        return self._encode(text, "prompt", add_special_tokens=True)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The tokens' text, special tokens included."""
        (text,) = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=False)
        return str(text)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation; see server.engine.base.Engine.tokenize_chat."""
        if self._chat.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.",
                "messages",
                "no_chat_template",
            )
        conversation = [dict(message) for message in messages]
        try:
            text = self._chat.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            str(text).encode()
        except Exception as error:  # a template is a program of the model's authors
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {str(error)[:300]}", "messages"
            ) from error
        # The template has written the special tokens that the model wants.
        return self._encode(str(text), "messages", add_special_tokens=False)

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        # What cannot fit is not worth the seconds that tokenizing it takes.
        if len(text) > self.max_characters:
            raise InvalidRequestError(
                f"This model's maximum context length is {self._max_tokens} tokens. However, your "
                f"prompt has {len(text)} characters, more than so many tokens can stand for "
                f"({self.max_characters}). Please reduce your prompt.",
                param,
                "context_length_exceeded",
            )
        # Unlike `encode`, it lets other threads run while it works.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids
