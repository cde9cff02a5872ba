"""Renders conversations by the model's own chat template, a program of the model's authors."""

import re
from functools import lru_cache
from typing import Any, Final

import jinja2.ext
from jinja2 import TemplateError, meta
from jinja2.nodes import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from server.engine.chat import Conversation
from server.engine.errors import InvalidRequestError

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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, for_tools: str | None = None) -> None:
        """`for_tools` renders conversations with tools if the model's own template cannot."""
        self._tokenizer = tokenizer
        self._for_tools = for_tools

    def render(self, conversation: Conversation) -> str:
        """Return the conversation's text, with the special tokens that the model expects.

        Raises:
            InvalidRequestError: the model has no template, the template reads no such variable or
                knows no tools, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.",
                "messages",
                "no_chat_template",
            )
        template = self._template(conversation)
        variables: Any = self._known_variables(conversation, self._settable(template))
        messages: Any = [dict(message) for message in conversation.messages]
        tools: Any = [tool.definition for tool in conversation.tools] or None
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=template,
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

    def _template(self, conversation: Conversation) -> str:
        """Return the model's template, or the one for tools if only that can render them.

        Raises:
            InvalidRequestError: there are tools, and neither knows them.
        """
        tools: Any = [tool.definition for tool in conversation.tools] or None
        own: str = self._tokenizer.get_chat_template(tools=tools)
        field = "tools" if conversation.tools else _field_with_calls(conversation)
        if field is None or "tools" in _variables(own):
            return own
        templates = self._tokenizer.chat_template
        if isinstance(templates, dict) and "tool_use" in templates:
            return str(templates["tool_use"])
        if self._for_tools is None:
            raise InvalidRequestError(
                "This model's chat template knows no tools; another one may be given to the "
                "server, with --chat-template.",
                field,
                "unsupported_parameter",
            )
        return self._for_tools

    def _settable(self, template: str) -> frozenset[str]:
        """Return the variables that a template reads and that a client may set."""
        return _variables(template) - _RESERVED - set(self._tokenizer.special_tokens_map)

    def _known_variables(
        self, conversation: Conversation, settable: frozenset[str]
    ) -> dict[str, object]:
        variables: dict[str, object] = {}
        for variable in conversation.variables:
            if variable.name in settable:
                variables[variable.name] = variable.value
            elif variable.is_required:
                name, known = variable.name[:100], ", ".join(sorted(settable)) or "none"
                raise InvalidRequestError(
                    f"The model's chat template reads no '{name}'; a request may set {known}.",
                    variable.field[:200],
                    "unsupported_parameter",
                )
        return variables


def _field_with_calls(conversation: Conversation) -> str | None:
    """Return the field of the first message that is a tool's or calls one; None if none is."""
    for place, message in enumerate(conversation.messages):
        if message["role"] == "tool":
            return f"messages[{place}].role"
        if message.get("tool_calls"):
            return f"messages[{place}].tool_calls"
    return None


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and does not set."""
    try:
        return frozenset(meta.find_undeclared_variables(parse_template(template)))
    except TemplateError:
        return frozenset()


def parse_template(template: str) -> Template:
    """Parse a chat template.

    Raises:
        TemplateError: it is none.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
    return environment.parse(_GENERATION.sub("", template))
