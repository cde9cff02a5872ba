"""Has a server continue prompts and score texts with one setting after another."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from server.evaluating import EvaluationError
from server.evaluating.client import EvaluationClient, TextScore
from server.evaluating.files import Item
from server.evaluating.plan import Sampling
from server.evaluating.questions import Question
from server.evaluating.settings import BASE, Setting

T = TypeVar("T")
Advance: TypeAlias = Callable[[str], None]
"""Moves the progress bar by one step of the work that it names."""


@dataclass(frozen=True, slots=True)
class Task:
    """Lists what each setting is measured with. An empty list is not measured."""

    sampling: Sampling
    gold_only: bool = False
    fluency: bool = True  # whether continuations are scored under the base model
    prompts: Sequence[Item] = ()
    texts: Sequence[Item] = ()
    questions: Sequence[Sequence[Question]] = ()  # of each file

    @property
    def steps(self) -> int:
        """The steps of one setting by which the progress bar moves."""
        continuations = len(self.prompts) * self.sampling.samples
        scored = continuations if self.fluency else 0
        return continuations + scored + len(self.texts) + sum(map(len, self.questions))


@dataclass(slots=True)
class Observed:
    """Holds the server's answers with one setting."""

    setting: Setting
    continuations: list[list[str]] = field(default_factory=list)  # of each prompt
    fluency: list[list[TextScore]] = field(default_factory=list)  # of each continuation
    texts: list[TextScore] = field(default_factory=list)
    choices: list[list[list[float]]] = field(default_factory=list)  # log-likelihoods, of each file


async def observe(
    client: EvaluationClient, setting: Setting, task: Task, advance: Advance
) -> Observed:
    """Measure one setting.

    Raises:
        EvaluationError: the server fails or refuses; the message names the setting and the place.
    """
    observed = Observed(setting)

    def step(name: str) -> Callable[[], None]:
        return lambda: advance(f"{setting.label}: {name}")

    async def ask(place: str, answer: Awaitable[T], done: Callable[[], None]) -> T:
        try:
            found = await answer
        except EvaluationError as error:
            raise EvaluationError(f"{setting.label}, {place}: {error}") from error
        done()
        return found

    sampling = task.sampling
    flat = await _together(
        ask(
            item.place,
            client.complete(
                item.prompt, sampling, sampling.seed + number * sampling.samples + sample, setting
            ),
            step("continuations"),
        )
        for number, item in enumerate(task.prompts)
        for sample in range(sampling.samples)
    )
    observed.continuations = _grouped(flat, sampling.samples)
    scored = await _together(
        ask(item.place, score_fluency(client, item.prompt, text), step("fluency"))
        for item, texts in zip(task.prompts, observed.continuations, strict=True)
        for text in (texts if task.fluency else ())
    )
    observed.fluency = _grouped(scored, sampling.samples)
    observed.texts = await _together(
        ask(
            item.place,
            client.score(item.text, len(item.prompt) if task.gold_only else 0, setting),
            step("perplexity"),
        )
        for item in task.texts
    )
    for questions in task.questions:
        scores = await _together(
            ask(each.place, _likelihoods(client, each, setting), step("questions"))
            for each in questions
        )
        observed.choices.append(scores)
    return observed


async def score_fluency(client: EvaluationClient, prompt: str, text: str) -> TextScore:
    """Score a continuation under the base model; one without text has no tokens."""
    return await client.score(prompt + text, len(prompt), BASE) if text else TextScore(0.0, 0)


async def _likelihoods(
    client: EvaluationClient, question: Question, setting: Setting
) -> list[float]:
    """Return the log-likelihood of each choice after the question's context."""
    start = len(question.context)
    scores = [
        await client.score(question.context + choice, start, setting) for choice in question.choices
    ]
    return [-score.nats for score in scores]


async def _together(answers: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first failure cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def _grouped(flat: list[T], size: int) -> list[list[T]]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]
