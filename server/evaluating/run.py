"""Runs an evaluation, from the first request to the report."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final, TypeAlias

from rich.progress import Progress

from server.evaluating import EvaluationError
from server.evaluating.client import EvaluationClient
from server.evaluating.inputs import Inputs
from server.evaluating.measures import Scores, quantities
from server.evaluating.observing import Observed, Task, observe
from server.evaluating.report import Result
from server.evaluating.scoring import score_texts
from server.evaluating.settings import BASE, Setting
from server.evaluating.statistics import Bootstrap, Quantity

Score: TypeAlias = Callable[[Sequence[str]], Sequence[float]]
"""Returns the toxicity of each text, 0 to 1."""

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
    return compare(client, observed, scores, inputs)


def compare(
    client: EvaluationClient,
    observed: Sequence[Observed],
    scores: Mapping[str, Sequence[Scores]],
    inputs: Inputs,
) -> Outcome:
    """Turn what was observed into results, each beside the first setting's.

    Args:
        observed: the base model's answers first.
        scores: the toxicity of each setting's continuations, by scorer.
        inputs: what `observed` was measured with.
    """
    measured = [
        quantities(
            each,
            {scorer: found[number] for scorer, found in scores.items()},
            inputs.text_file,
            inputs.questions,
            length_normalized=inputs.judging.length_normalized,
        )
        for number, each in enumerate(observed)
    ]
    bootstrap = Bootstrap(inputs.task.sampling.seed)
    results = [
        _result(each.setting, client, own, measured[0], bootstrap)
        for each, own in zip(observed, measured, strict=True)
    ]
    continuations = [
        each
        for number, seen in enumerate(observed)
        for each in _continuations(
            seen, inputs.task, {scorer: found[number] for scorer, found in scores.items()}
        )
    ]
    return Outcome(client.model, results, continuations)


def scores_by(score: Score, observed: Sequence[Observed]) -> list[Scores]:
    """Score all continuations in one call; return the toxicity of each setting's."""
    groups = [group for each in observed for group in each.continuations]
    flat = iter(score([text for group in groups for text in group]) if groups else ())
    return [[list(islice(flat, len(group))) for group in each.continuations] for each in observed]


async def _try(client: EvaluationClient, settings: Sequence[Setting]) -> None:
    """Use each setting once, so that a wrong one is refused before the others are measured."""
    for setting in settings:
        try:
            await client.score(_TRIED, 0, setting)
        except EvaluationError as error:
            raise EvaluationError(f"{setting.label}: {error}") from error


def _scores(inputs: Inputs, observed: Sequence[Observed], bar: Progress) -> dict[str, list[Scores]]:
    """Score all continuations with each scorer, whose progress the bar shows."""
    total = sum(len(group) for each in observed for group in each.continuations)
    found = {}
    for spec, scorer in inputs.scorers.items():
        row = bar.add_task(f"scores by {spec}", total=total)
        found[spec] = scores_by(
            partial(score_texts, scorer, advance=partial(bar.advance, row)), observed
        )
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
    observed: Observed, task: Task, toxicity: Mapping[str, Scores]
) -> Iterator[Continuation]:
    for number, texts in enumerate(observed.continuations):
        for sample, text in enumerate(texts):
            scores = {spec: groups[number][sample] for spec, groups in toxicity.items()}
            prompt = task.prompts[number].prompt
            yield Continuation(observed.setting.label, prompt, sample, text, scores)
