"""Reads multiple-choice questions: MMLU's fields in JSON, or TruthfulQA's table."""

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import JsonValue

from server.evaluating import EvaluationInputError
from server.evaluating.files import InputFile, parse_object, read_file, text_field
from server.strict_json import parse_json

ChoiceFormat: TypeAlias = Literal["text", "letters"]

_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


@dataclass(frozen=True, slots=True)
class Question:
    """A question's context, and the choices, each of which could follow it."""

    place: str  # file and line, or number of the question, for errors
    context: str
    choices: tuple[str, ...]  # each begins with a blank
    best: int  # index of the choice that counts as the answer
    correct: frozenset[int]  # indices of all true choices, `best` among them


def read_questions(
    path: Path, limit: int | None, choice_format: ChoiceFormat
) -> tuple[InputFile, list[Question]]:
    """Read TruthfulQA's table (*.csv), or a JSON list or JSON lines of MMLU's fields.

    MMLU's fields are {"question", "choices", "answer"}, and "answer" is the index of a choice.

    Args:
        limit: the most questions to take, from the first on; None takes all.
        choice_format: "text" scores each choice's text; "letters" lists MMLU's choices with letters
            in the context, and scores the letters.

    Raises:
        EvaluationInputError: the file cannot be read, has no question, or a question is wrong.
    """
    file, text = read_file(path)
    if path.suffix == ".csv":
        questions = _truthful(path, text, limit)
    else:
        questions = [
            _mmlu(value, place, choice_format) for place, value in _objects(path, text)[:limit]
        ]
    if not questions:
        raise EvaluationInputError(f"{path}: the file has no question")
    return file, questions


def _objects(path: Path, text: str) -> list[tuple[str, dict[str, JsonValue]]]:
    if path.suffix == ".jsonl":
        lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), start=1)]
        return [(place, parse_object(line, place)) for place, line in lines if line.strip()]
    try:
        values = parse_json(text)
    except ValueError as error:
        raise EvaluationInputError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise EvaluationInputError(f"{path}: not a JSON list of questions")
    objects = [value for value in values if isinstance(value, dict)]
    if len(objects) < len(values):
        raise EvaluationInputError(f"{path}: not a JSON list of questions")
    return [(f"{path}, question {n}", value) for n, value in enumerate(objects, start=1)]


def _mmlu(value: dict[str, JsonValue], place: str, choice_format: ChoiceFormat) -> Question:
    question = text_field(value, "question", place)
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise EvaluationInputError(f"{place}: the field 'choices' must be a list of 2 to 26 texts")
    texts = [text_field({"choices": choice}, "choices", place) for choice in choices]
    # True is an int in Python, but no index.
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise EvaluationInputError(
            f"{place}: the field 'answer' must be the index of a choice, 0 to {len(texts) - 1}"
        )
    context, offered = f"Question: {question}\nAnswer:", texts
    if choice_format == "letters":
        offered = [chr(ord("A") + index) for index in range(len(texts))]
        listed = "\n".join(f"{a}. {text}" for a, text in zip(offered, texts, strict=True))
        context = f"{question}\n{listed}\nAnswer:"
    return Question(
        place, context, tuple(f" {text}" for text in offered), answer, frozenset({answer})
    )


def _truthful(path: Path, text: str, limit: int | None) -> list[Question]:
    try:
        reader = csv.DictReader(StringIO(text, newline=""), strict=True)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise EvaluationInputError(f"{path}: the table has no column {missing[0]!r}")
        rows = [(f"{path}:{reader.line_num}", row) for row in reader][:limit]
    except csv.Error as error:
        raise EvaluationInputError(f"{path}: not a table: {error}") from error
    return [_truthful_question(row, place) for place, row in rows]


def _truthful_question(row: dict[str, str | None], place: str) -> Question:
    fields: dict[str, JsonValue] = {name: row[name] for name in _COLUMNS}
    question, best, correct, wrong = (text_field(fields, name, place) for name in _COLUMNS)
    others = [text for text in _answers(correct) if text != best.strip()]
    if not (incorrect := _answers(wrong)):
        raise EvaluationInputError(f"{place}: the question has no incorrect answer")
    choices = [best.strip(), *others, *incorrect]
    return Question(
        place,
        f"Q: {question}\nA:",
        tuple(f" {text}" for text in choices),
        0,
        frozenset(range(1 + len(others))),
    )


def _answers(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]
