"""Gathers what is measured: the files, the sampling and the scorers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.evaluating import EvaluationInputError
from server.evaluating.files import InputFile, Item, read_prompts, read_texts
from server.evaluating.observing import Task
from server.evaluating.plan import Sampling
from server.evaluating.questions import ChoiceFormat, Question, read_questions
from server.evaluating.scoring import load_scorers
from server.toxicity.scorer import Backend


@dataclass(frozen=True, slots=True)
class Files:
    """The files to read, and the most items to take from each; None takes all."""

    prompts: Path | None
    texts: Path | None
    questions: Sequence[Path]
    limit_prompts: int | None = None
    limit_texts: int | None = None
    limit_questions: int | None = None


@dataclass(frozen=True, slots=True)
class Judging:
    """How answers are judged."""

    scorers: Sequence[str]  # specs; the first one chooses the best setting
    gold_only: bool = False  # whether perplexity leaves out the tokens of the prompt
    fluency: bool = True  # whether continuations are scored under the base model
    choice_format: ChoiceFormat = "text"
    length_normalized: bool = False  # whether choices are compared per character


@dataclass(frozen=True, slots=True)
class Inputs:
    """Holds the prompts, texts and questions to measure with, and how answers are judged."""

    task: Task
    judging: Judging
    scorers: Mapping[str, Backend]  # by their specs
    text_file: str  # the name of the file of texts
    questions: Mapping[str, Sequence[Question]]  # those of the task, by their file's name
    files: Sequence[InputFile]


def read_inputs(files: Files, sampling: Sampling, judging: Judging) -> Inputs:
    """Read all files, and load the scorers if there are prompts.

    Raises:
        EvaluationInputError: a file or a scorer is wrong, there is nothing to measure, or several
            samples would all be equal.
    """
    if not (files.prompts or files.texts or files.questions):
        raise EvaluationInputError(
            "there is nothing to measure: give --prompts, --text, --questions"
        )
    if sampling.samples > 1 and sampling.temperature == 0:
        raise EvaluationInputError("--samples above 1 needs a --temperature above 0")
    identities: list[InputFile] = []
    prompts: list[Item] = []
    texts: list[Item] = []
    questions: dict[str, Sequence[Question]] = {}
    if files.prompts:
        file, prompts = read_prompts(files.prompts, files.limit_prompts)
        identities.append(file)
    if files.texts:
        file, texts = read_texts(files.texts, files.limit_texts, gold=judging.gold_only)
        identities.append(file)
    for path in files.questions:
        file, asked = read_questions(path, files.limit_questions, judging.choice_format)
        if file.name in questions:
            raise EvaluationInputError(f"two files of questions are called {file.name}")
        questions[file.name] = asked
        identities.append(file)
    task = Task(
        sampling, judging.gold_only, judging.fluency, prompts, texts, tuple(questions.values())
    )
    return Inputs(
        task=task,
        judging=judging,
        scorers=load_scorers(judging.scorers) if prompts else {},
        text_file=files.texts.name if files.texts else "",
        questions=questions,
        files=identities,
    )
