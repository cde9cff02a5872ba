"""Reads the prompts to continue, and the texts whose perplexity is measured."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from server.evaluating import EvaluationInputError
from server.strict_json import parse_json


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt or a text. `gold` is what follows the prompt in the file, or empty."""

    place: str  # file and line, for errors
    prompt: str
    gold: str = ""

    @property
    def text(self) -> str:
        """The prompt and what follows it."""
        return self.prompt + self.gold


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file's name and the hash of its bytes, which identify it in a report."""

    name: str
    sha256: str  # hexadecimal


def read_prompts(path: Path, limit: int | None) -> tuple[InputFile, list[Item]]:
    """Read prompts: JSON lines with a field "prompt" (*.jsonl), or one prompt a line.

    Args:
        limit: the most prompts to take, from the first on; None takes all.

    Raises:
        EvaluationInputError: the file cannot be read, has no prompt, or a line is wrong.
    """
    return _read(path, limit, _prompt)


def read_texts(path: Path, limit: int | None, *, gold: bool) -> tuple[InputFile, list[Item]]:
    """Read texts: JSON lines with "prompt" and "gold", or with "text" (*.jsonl); or one a line.

    Args:
        limit: the most texts to take, from the first on; None takes all.
        gold: whether each text must have a gold part.

    Raises:
        EvaluationInputError: the file cannot be read, has no text, or a line is wrong.
    """
    file, items = _read(path, limit, _text)
    for item in items:
        if gold and not item.gold:
            raise EvaluationInputError(
                f'{item.place}: --gold-only needs lines of {{"prompt", "gold"}}'
            )
    return file, items


def read_file(path: Path) -> tuple[InputFile, str]:
    """Return a UTF-8 file's identity and its text, without a byte order mark.

    Raises:
        EvaluationInputError: the file cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        text = data.decode().removeprefix("\ufeff")
    except OSError as error:
        raise EvaluationInputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationInputError(f"{path}: byte {error.start} is not UTF-8") from error
    return InputFile(path.name, hashlib.sha256(data).hexdigest()), text


def parse_object(line: str, place: str) -> dict[str, JsonValue]:
    """Return the JSON object of a line; raise EvaluationInputError if it is none."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise EvaluationInputError(f"{place}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EvaluationInputError(f"{place}: not a JSON object")
    return value


def text_field(value: dict[str, JsonValue], name: str, place: str) -> str:
    """Return a text field; raise EvaluationInputError if it is missing or blank."""
    text = value.get(name)
    if not isinstance(text, str) or not text.strip():
        raise EvaluationInputError(f"{place}: the field {name!r} must be a text that is not blank")
    return text


def _read(
    path: Path, limit: int | None, parse: Callable[[dict[str, JsonValue], str], Item]
) -> tuple[InputFile, list[Item]]:
    file, text = read_file(path)
    items: list[Item] = []
    for place, line in _lines(path, text):
        if limit is not None and len(items) == limit:
            break
        if path.suffix == ".jsonl":
            items.append(parse(parse_object(line, place), place))
        else:
            items.append(Item(place, line))
    if not items:
        raise EvaluationInputError(f"{path}: the file has no text")
    return file, items


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank, with its place."""
    # splitlines() would split a text at a form feed or another of Unicode's line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def _prompt(value: dict[str, JsonValue], place: str) -> Item:
    # RealToxicityPrompts' own file has an object here, with scores beside the text.
    inner = value.get("prompt")
    if isinstance(inner, dict):
        return Item(place, text_field(inner, "text", f"{place}, prompt"))
    return Item(place, text_field(value, "prompt", place))


def _text(value: dict[str, JsonValue], place: str) -> Item:
    if "text" in value:
        return Item(place, text_field(value, "text", place))
    return Item(place, text_field(value, "prompt", place), text_field(value, "gold", place))
