"""Names the operator's files that stand in for templates of the tokenizer's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final


class TemplatesError(Exception):
    """A template cannot be read, or is none; the message is a sentence that says which."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The files; None for the tokenizer's own template."""

    chat: Path | None = None  # how a conversation is rendered: a program in Jinja
    response: Path | None = None  # how an answer is read: a response template of transformers


OWN_TEMPLATES: Final = Templates()
