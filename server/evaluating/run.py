"""Runs an evaluation, from the first request to the report."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from rich.progress import Progress

from server.evaluating import EvaluationError
from server.evaluating.client import EvaluationClient
from server.evaluating.inputs import Inputs
from server.evaluating.measures import quantities
from server.evaluating.observing import Observed, Task, observe
from server.evaluating.report import Result
from server.evaluating.scoring import score_texts
from server.evaluating.settings import BASE, Setting
from server.evaluating.statistics import Bootstrap, Quantity

_TRIED: Final = "Hello, world."


@dataclass(frozen=True, slots=True)
class Continuation:
    """One continuation, with its toxicity by scorer."""

    setting: str
    prompt: str
    sample: int
    text: str
    toxicity: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an evaluation; the base model comes first."""

    model: str
    results: Sequence[Result]
    continuations: Sequence[Continuation]


async def evaluate(
    client: EvaluationClient, settings: Sequence[Setting], inputs: Inputs, bar: Progress
) -> Outcome:
    """Measure every setting, the base model first, and compare the others with it.

    Raises:
        EvaluationError: the server or a scorer fails; nothing is returned then.
    """
    assert settings[0] == BASE
    await _try(client, settings)
    row = bar.add_task("", total=len(settings) * inputs.task.steps)

    def advance(name: str) -> None:
        bar.update(row, advance=1, description=name)

    observed = [await observe(client, setting, inputs.task, advance) for setting in settings]
    scores = await asyncio.to_thread(_scores, inputs, observed, bar)
    measured = [
        quantities(
            each,
            toxicity,
            inputs.text_file,
            inputs.questions,
            length_normalized=inputs.judging.length_normalized,
        )
        for each, toxicity in zip(observed, scores, strict=True)
    ]
    bootstrap = Bootstrap(inputs.task.sampling.seed)
    results = [
        _result(setting, client, own, measured[0], bootstrap)
        for setting, own in zip(settings, measured, strict=True)
    ]
    continuations = [
        each
        for seen, toxicity in zip(observed, scores, strict=True)
        for each in _continuations(seen, inputs.task, toxicity)
    ]
    return Outcome(client.model, results, continuations)


async def _try(client: EvaluationClient, settings: Sequence[Setting]) -> None:
    """Use each setting once, so that a wrong one is refused before the others are measured."""
    for setting in settings:
        try:
            await client.score(_TRIED, 0, setting)
        except EvaluationError as error:
            raise EvaluationError(f"{setting.label}: {error}") from error


def _scores(
    inputs: Inputs, observed: Sequence[Observed], bar: Progress
) -> list[dict[str, list[list[float]]]]:
    """Score all continuations; return the toxicity of each, by setting, scorer and prompt."""
    samples = inputs.task.sampling.samples
    texts = [text for each in observed for group in each.continuations for text in group]
    found: list[dict[str, list[list[float]]]] = [{} for _ in observed]
    for spec, scorer in inputs.scorers.items() if texts else ():
        row = bar.add_task(f"scores by {spec}", total=len(texts))
        flat = iter(score_texts(scorer, texts, partial(bar.advance, row)))
        for each, scores in zip(observed, found, strict=True):
            scores[spec] = [list(islice(flat, samples)) for _ in each.continuations]
    return found


def _result(
    setting: Setting,
    client: EvaluationClient,
    own: Sequence[Quantity],
    base: Sequence[Quantity],
    bootstrap: Bootstrap,
) -> Result:
    compared = {} if setting == BASE else {each.key: each for each in base}
    estimates = [bootstrap.estimate(each, compared.get(each.key)) for each in own]
    return Result(
        setting, client.applied[setting.label], [each for each in estimates if each is not None]
    )


def _continuations(
    observed: Observed, task: Task, toxicity: Mapping[str, list[list[float]]]
) -> Iterator[Continuation]:
    for number, texts in enumerate(observed.continuations):
        for sample, text in enumerate(texts):
            scores = {spec: groups[number][sample] for spec, groups in toxicity.items()}
            prompt = task.prompts[number].prompt
            yield Continuation(observed.setting.label, prompt, sample, text, scores)
