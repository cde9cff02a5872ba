"""Turns texts and conversations into token ids, and back. Used from any thread."""

from collections.abc import Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from server.engine.chat import ChatPrompt, Conversation
from server.engine.errors import InvalidRequestError
from server.engine.output import PromptDescription, TokenizerDescription
from server.engine.templates import OWN_TEMPLATES, Templates
from server.engine.text.answer_parser import TemplateFormat, part_at_end, without_fields
from server.engine.text.call_marks import call_syntax, marks_of
from server.engine.text.chat_template import ChatTemplate
from server.engine.text.response_format import CALLS, find_format, install_templates
from server.engine.text.running_text import RunningText
from server.engine.text.vocabulary import Vocabulary


class Prompts:
    """Implements server.engine.base.PromptReader, for a context of `max_tokens`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        templates: Templates = OWN_TEMPLATES,
    ) -> None:
        """Read prompts.

        Raises:
            TemplatesError: a template is none.
        """
        install_templates(templates, tokenizer)
        self._source = tokenizer
        self._format = find_format(tokenizer, given=templates.response is not None)
        for_tools = None if self._format is None else self._format.chat_template
        self._template = ChatTemplate(tokenizer, for_tools)
        self._tokenizer = tokenizer.backend_tokenizer
        # A tokenizer's file may turn on truncation or padding, which would silently change prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = Vocabulary(self._tokenizer)
        self._special = {self.name(token): token for token in self._vocabulary.special}
        self._max_tokens = max_tokens
        # The text of a token has at most as many characters as the token's name.
        self.max_characters = max_tokens * max(map(len, self._tokenizer.get_vocab()))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids; see `PromptReader.tokenize`.

        Raises:
            InvalidRequestError: the text has more than `max_characters`.
        """
        return self._encode(text, "prompt", add_special_tokens=add_special_tokens).ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text, special tokens included."""
        (text,) = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=False)
        return str(text)

    def describe_prompt(self, prompt: str | Sequence[int]) -> PromptDescription:
        """Return a prompt's tokens and text; see `PromptReader.describe_prompt`."""
        if isinstance(prompt, str):
            encoding = self._encode(prompt, "prompt", add_special_tokens=True)
            return self._described(encoding.ids, prompt, _token_starts(encoding.offsets))
        if len(prompt) > self._max_tokens:
            raise InvalidRequestError(
                f"This model's maximum context length is {self._max_tokens} tokens. However, your "
                f"prompt has {len(prompt)}. Please reduce your prompt.",
                "prompt",
                "context_length_exceeded",
            )
        running = RunningText(self._vocabulary)
        added = [(running.push(token), running.token_start) for token in prompt]
        return self._described(prompt, "".join(text for text, _ in added), [at for _, at in added])

    def _described(
        self, tokens: Sequence[int], text: str, offsets: Sequence[int]
    ) -> PromptDescription:
        if not tokens:
            raise InvalidRequestError("The prompt is empty.", "prompt")
        first = self._vocabulary.with_logprob(tokens[0], 0.0).text
        return PromptDescription(tuple(tokens), text, tuple(offsets), first)

    def read_chat(self, conversation: Conversation) -> ChatPrompt:
        """Return a conversation's token ids and its answers' format; see `PromptReader`."""
        text = self._template.render(conversation)
        # The template has already written the special tokens that the model expects.
        tokens = self._encode(text, "messages", add_special_tokens=False).ids
        known, tools = self._format, conversation.tools
        if tools and (known is None or not known.has_calls):
            raise InvalidRequestError(
                "This server does not know how this model writes calls of tools; it may be told "
                "with --response-template.",
                "tools",
                "unsupported_parameter",
            )
        if known is None or not (tools or known.has_reasoning):
            return ChatPrompt(tokens)
        template = known.template if tools else without_fields(known.template, {CALLS})
        format_ = TemplateFormat(
            template,
            part_at_end(template, text),
            tools,
            marks_of(known, template.fields, self._special),
            None if known.calls is None else call_syntax(known.calls, self._special),
        )
        return ChatPrompt(tokens, format_)

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return the tokens' names in the vocabulary; that of an unknown id is empty."""
        return [self.name(token) for token in tokens]

    def name(self, token: int) -> str:
        """Return a token's name in the vocabulary; that of an unknown id is empty."""
        return self._tokenizer.id_to_token(token) or ""

    @property
    def tokenizer(self) -> TokenizerDescription:
        """The tokenizer's special tokens and chat template."""
        source = self._source
        template = source.chat_template
        return TokenizerDescription(
            type(source).__name__,
            source.bos_token,
            source.eos_token,
            source.pad_token,
            source.unk_token,
            template if isinstance(template, str) else None,
        )

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> Encoding:
        # A text that cannot fit is refused first, because tokenizing it can take seconds.
        if len(text) > self.max_characters:
            raise InvalidRequestError(
                f"This model's maximum context length is {self._max_tokens} tokens. However, your "
                f"prompt has {len(text)} characters, more than so many tokens can stand for "
                f"({self.max_characters}). Please reduce your prompt.",
                param,
                "context_length_exceeded",
            )
        # Unlike `encode`, `encode_batch` lets other threads run while it works.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding


def _token_starts(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return where each token starts in a text, given the spans that a tokenizer reports.

    A tokenizer may leave the blank before a word out of the word's span, and gives (0, 0) to the
    special tokens that it adds.
    """
    starts, end = [], 0
    for start, stop in spans:
        # Tokens that are parts of one character all have its span.
        starts.append(min(start, end) if stop > start else end)
        end = max(end, stop)
    return starts
