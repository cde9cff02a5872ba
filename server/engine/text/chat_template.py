"""Renders conversations by the model's own chat template, a program of the model's authors."""

import re
from functools import lru_cache
from typing import Any, Final

import jinja2.ext
from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from server.engine.errors import InvalidRequestError
from server.engine.request import Conversation

# transformers sets these itself, so a client may not.
_RESERVED: Final = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("raise_exception", "strftime_now"),
    }
)
# A tag of transformers' own, which jinja2 does not know.
_GENERATION: Final = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations. Used from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads and that a client may set."""
        read = _variables(self._tokenizer.get_chat_template())
        return read - _RESERVED - set(self._tokenizer.special_tokens_map)

    def render(self, conversation: Conversation) -> str:
        """Return the conversation's text, with the special tokens that the model expects.

        Raises:
            InvalidRequestError: the model has no template, the template reads no such variable, or
                it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.",
                "messages",
                "no_chat_template",
            )
        variables: Any = self._known_variables(conversation)
        messages = [dict(message) for message in conversation.messages]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=conversation.add_generation_prompt,
                    continue_final_message=conversation.continue_final_message,
                    **variables,
                )
            )
            text.encode()
        except Exception as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {str(error)[:300]}", "messages"
            ) from error
        return text

    def _known_variables(self, conversation: Conversation) -> dict[str, object]:
        variables: dict[str, object] = {}
        for variable in conversation.variables:
            if variable.name in self.variables:
                variables[variable.name] = variable.value
            elif variable.is_required:
                name, known = variable.name[:100], ", ".join(sorted(self.variables)) or "none"
                raise InvalidRequestError(
                    f"The model's chat template reads no '{name}'; a request may set {known}.",
                    variable.field[:200],
                    "unsupported_parameter",
                )
        return variables


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and does not set."""
    environment = ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(parsed))
