"""Finds how a chat model writes its reasoning and its calls of tools.

A format is data: transformers' response template, and with it how calls are written. The folder
`formats` has one for each family of models whose tokenizers bring none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from server.engine.templates import Templates, TemplatesError
from server.engine.text.chat_template import parse_template

T = TypeVar("T")
Json: TypeAlias = Mapping[str, Any]

REASONING: Final = frozenset({"thinking", "reasoning", "reasoning_content"})
CALLS: Final = "tool_calls"
_CALL_KEYS: Final = frozenset({"mark", "opening", "separator", "closing", "arguments"})
# The keys that a format has beside those of a response template.
_OWN_KEYS: Final = frozenset({"recognise", "unless", "calls", "chat_template"})


@dataclass(frozen=True, slots=True, eq=False)
class ResponseFormat:
    """How a model writes its answers."""

    template: ResponseTemplate
    # For each part of an answer, a text in which its marks occur, as they are or as patterns.
    marks: Mapping[str, str]
    calls: Json | None = None  # the pieces of `CallSyntax` as texts; None if they are not known
    chat_template: str | None = None  # knows tools; for a model whose own template knows none

    @property
    def has_reasoning(self) -> bool:
        """True if answers may have a part that is the model's reasoning."""
        return not REASONING.isdisjoint(self.template.fields)

    @property
    def has_calls(self) -> bool:
        """True if calls of tools are told from the text."""
        return CALLS in self.template.fields


def install_templates(templates: Templates, tokenizer: PreTrainedTokenizerFast) -> None:
    """Have a tokenizer use the operator's templates, those that are given.

    Raises:
        TemplatesError: a file cannot be read, or has no such template.
    """
    if templates.chat is not None:
        text = _read("--chat-template", templates.chat, _checked_chat_template)
        tokenizer.chat_template = text
    if templates.response is not None:
        given = _read("--response-template", templates.response, _checked_response_template)
        tokenizer.response_template = given


def _read(option: str, path: Path, check: Callable[[str], T]) -> T:
    try:
        return check(path.read_text())
    except (OSError, ValueError, TemplateError) as error:
        raise TemplatesError(f"cannot use the template of {option}: {error}") from error


def _checked_chat_template(text: str) -> str:
    parse_template(text)
    return text


def _checked_response_template(text: str) -> object:
    given = json.loads(text)
    read_format(given)
    return given


def read_format(given: object) -> ResponseFormat:
    """Read a format.

    Args:
        given: a response template of transformers, with more keys that may be left out: `calls`
            has the pieces of `server.engine.chat.CallSyntax` as texts, `recognise` the texts that
            all occur in the model's chat template, `unless` those that do not, and
            `chat_template` a template that knows tools, in place of the model's own.

    Raises:
        ValueError: it is no such template.
    """
    if not isinstance(given, dict):
        raise ValueError("a response template is a JSON object")
    template = {key: value for key, value in given.items() if key not in _OWN_KEYS}
    try:
        loaded = load_response_template(template)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a value is of a wrong kind: {error}") from error
    calls = given.get("calls")
    if calls is not None:
        _check_calls(calls)
    for field in loaded.fields.values():
        field.optional = True  # an answer is what it is, whatever the template expects
    marks = {
        name: json.dumps(field, ensure_ascii=False) for name, field in template["fields"].items()
    }
    chat_template = given.get("chat_template")
    if not isinstance(chat_template, str | None):
        raise ValueError("'chat_template' must be a string")
    return ResponseFormat(loaded, marks, calls, chat_template)


def find_format(
    tokenizer: PreTrainedTokenizerFast, *, given: bool = False
) -> ResponseFormat | None:
    """Return the format of a model's answers, None if it is not known.

    The tokenizer's own comes first, then one of those in `formats`. As transformers' templates do
    not say how calls are written, the latter says it for both, unless the tokenizer's is `given`
    by the operator.

    Raises:
        TemplatesError: the tokenizer's own is no response template.
    """
    own = getattr(tokenizer, "response_template", None)
    known = recognised(_all_templates(tokenizer))
    if own is None:
        return known
    try:
        found = read_format(own)
    except ValueError as error:
        raise TemplatesError(f"the tokenizer's response template: {error}") from error
    if found.calls is None and known is not None and not given:
        found = replace(found, calls=known.calls, chat_template=known.chat_template)
    return found


def _all_templates(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a tokenizer's chat template, or all of them if it has several."""
    own = tokenizer.chat_template
    return "\n".join(own.values()) if isinstance(own, dict) else own or ""


def recognised(chat_template: str) -> ResponseFormat | None:
    """Return the format in `formats` whose texts occur in a chat template, the most exact one."""
    matching = [
        (len(texts), known)
        for texts, others, known in _known()
        if all(text in chat_template for text in texts)
        and not any(text in chat_template for text in others)
    ]
    return max(matching, key=lambda each: each[0], default=(0, None))[1]


@cache
def _known() -> Sequence[tuple[Sequence[str], Sequence[str], ResponseFormat]]:
    folder = files(__package__) / "formats"
    found = []
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.name.endswith(".json"):
            given = json.loads(file.read_text())
            if (name := given.get("chat_template")) is not None:
                given["chat_template"] = (folder / name).read_text()
            found.append((given["recognise"], given.get("unless", ()), read_format(given)))
    return tuple(found)


def _check_calls(calls: object) -> None:
    if not isinstance(calls, dict) or calls.keys() != _CALL_KEYS:
        raise ValueError(f"'calls' is an object with {', '.join(sorted(_CALL_KEYS))}")
    for key, text in calls.items():
        if not isinstance(text, str) and not (key == "separator" and text is None):
            raise ValueError(f"'calls.{key}' must be a string")
