"""Reads the training files of `steerserve fit`: sentences, one a line, and pairs in JSON lines."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.strict_json import parse_json

_PROMPTS: Final = ("positive_prompt", "negative_prompt")


class TrainingFileError(ValueError):
    """A training file cannot be read or is not valid; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class PromptedText:
    """A text after its prompt, which may be empty."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class TextPair:
    """A preference: `positive` rather than `negative`."""

    positive: PromptedText
    negative: PromptedText


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """A text file's lines, and the name and hash that identify it in a manifest."""

    name: str
    sha256: str  # hexadecimal, of the file's bytes
    lines: tuple[str, ...]  # without line ends; at least one line, none blank


def read_lines(path: Path) -> TrainingFile:
    """Read a UTF-8 text file that has something on every line.

    Raises:
        TrainingFileError: the file is missing, is empty, is not UTF-8, or has a blank line.
    """
    try:
        data = path.read_bytes()
        text = data.decode().removeprefix("\ufeff")  # a byte order mark
    except OSError as error:
        raise TrainingFileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TrainingFileError(f"{path}: byte {error.start} is not UTF-8") from error
    # splitlines() would split a sentence at a form feed or another of Unicode's line ends.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise TrainingFileError(f"{path}: the file is empty: it needs a text on every line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise TrainingFileError(f"{path}:{number}: the line is empty: remove it")
    # The manifest is UTF-8, whatever bytes the name has.
    name = path.name.encode(errors="replace").decode()
    return TrainingFile(name, hashlib.sha256(data).hexdigest(), tuple(lines))


def read_sides(source: Path, target: Path) -> tuple[TrainingFile, TrainingFile]:
    """Read the sentences to steer away from and those to steer towards.

    Raises:
        TrainingFileError: `read_lines` refuses a file, or both hold the same sentences.
    """
    source_file, target_file = read_lines(source), read_lines(target)
    if set(source_file.lines) == set(target_file.lines):
        raise TrainingFileError(
            f"{source} and {target} hold the same sentences: --source must be the text to steer "
            "away from, --target the text to steer towards"
        )
    return source_file, target_file


def read_pairs(path: Path) -> tuple[TrainingFile, list[TextPair]]:
    """Read JSON lines of `{"prompt"?, "positive", "negative"}`, or with a prompt for each side.

    The latter are `{"positive_prompt", "positive", "negative_prompt", "negative"}`.

    Raises:
        TrainingFileError: `read_lines` refuses the file, or a line is not such an object.
    """
    file = read_lines(path)
    pairs = [_pair(line, f"{path}:{number}") for number, line in enumerate(file.lines, start=1)]
    return file, pairs


def _pair(line: str, place: str) -> TextPair:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise TrainingFileError(f"{place}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TrainingFileError(f"{place}: a pair is an object, not {json.dumps(value)[:40]}")
    if unknown := sorted(value.keys() - {"positive", "negative", "prompt", *_PROMPTS}):
        raise TrainingFileError(f"{place}: unknown field {unknown[0]!r}")
    of_positive, of_negative = _prompts(value, place)
    return TextPair(
        PromptedText(of_positive, _text(value, "positive", place)),
        PromptedText(of_negative, _text(value, "negative", place)),
    )


def _prompts(value: Mapping[str, object], place: str) -> tuple[str, str]:
    """Return the prompts of both sides; without any field for them, both are empty."""
    own = [field for field in _PROMPTS if field in value]
    if own and "prompt" in value:
        raise TrainingFileError(
            f"{place}: either the field 'prompt' is the prompt of both sides, or each side has "
            f"its own: 'prompt' and {own[0]!r} are both there"
        )
    if len(own) == 1:
        (missing,) = set(_PROMPTS) - set(own)
        raise TrainingFileError(f"{place}: {own[0]!r} needs the field {missing!r} beside it")
    prompts = []
    for field in own or ("prompt", "prompt"):
        prompt = value.get(field, "")
        if not isinstance(prompt, str):
            raise TrainingFileError(f"{place}: the field {field!r} must be a string")
        prompts.append(prompt)
    return prompts[0], prompts[1]


def _text(value: Mapping[str, object], field: str, place: str) -> str:
    text = value.get(field)
    if not isinstance(text, str) or not text.strip():
        raise TrainingFileError(
            f"{place}: the field {field!r} must be a string that says something"
        )
    return text
