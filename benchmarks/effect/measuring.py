"""Measures arms with the code of `steerserve evaluate`, one that has a prefix included."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

from rich.progress import Progress

from benchmarks.decoding import BenchmarkError
from benchmarks.effect.arms import MAX_INCREASE, Arm, Choice
from benchmarks.effect.data import TEXTS_FILE, Rows
from server.evaluating.client import EvaluationClient, TextScore
from server.evaluating.files import Item
from server.evaluating.inputs import Inputs, Judging
from server.evaluating.observing import Advance, Observed, Task, observe, score_fluency
from server.evaluating.plan import PRESETS
from server.evaluating.run import Outcome, Score, compare, scores_by
from server.evaluating.tradeoff import best, points

Tokenizer: TypeAlias = Any  # transformers' class has no types
HOUSE: Final = PRESETS["house"]


async def measure(
    client: EvaluationClient,
    tokenizer: Tokenizer,
    arms: Sequence[Arm],
    rows: Rows,
    judges: Mapping[str, Score],
    bar: Progress,
    *,
    fluency: bool,
) -> Outcome:
    """Measure arms, each beside the first one, the base model.

    Args:
        tokenizer: the served model's, a fast one.
        judges: by name, the functions that score continuations.
        fluency: whether continuations are also scored under the base model, after the plain prompt.

    Raises:
        EvaluationError: the server or a judge fails.
        BenchmarkError: a prefix changes the tokens of a text.
    """
    task = Task(HOUSE.sampling, HOUSE.gold_only, fluency, rows.prompts, rows.texts)
    row = bar.add_task("", total=len(arms) * task.steps)

    def advance(name: str) -> None:
        bar.update(row, advance=1, description=name)

    observed: list[Observed] = []
    for arm in arms:
        if arm.prefix:
            found = await _observe_prefixed(client, tokenizer, arm, task, advance)
            _check_tokens(arm, rows.texts, observed[0].texts, found.texts)
        else:
            found = await observe(client, arm.setting, task, advance)
        observed.append(found)
    scores = {
        name: await asyncio.to_thread(scores_by, score, observed) for name, score in judges.items()
    }
    return compare(
        client, observed, scores, Inputs(task, Judging([*judges]), {}, TEXTS_FILE, {}, ())
    )


def choose(choice: Choice, outcome: Outcome) -> Arm | None:
    """Return the candidate that lowers the toxic share most at an accepted rise of perplexity.

    None if no candidate lowers it so. The first judge of the outcome decides.
    """
    arms = {arm.setting.label: arm for arm in choice.candidates}
    base, *others = outcome.results
    results = [base, *(each for each in others if each.setting.label in arms)]
    found = best(points(results, HOUSE.decides), MAX_INCREASE)
    return None if found is None else arms[found.result.setting.label]


def prefixed(item: Item, prefix: str, tokenizer: Tokenizer) -> Item:
    """Put a prefix and a text's first token in front of the rest of the text, which is the gold.

    The first token of a text without a prefix has no probability. So that the same tokens are
    counted with a prefix, the gold begins at the second one.
    """
    offsets = tokenizer(item.text, return_offsets_mapping=True)["offset_mapping"]
    second = offsets[1][0] if len(offsets) > 1 else len(item.text)
    return Item(item.place, prefix + item.text[:second], item.text[second:])


async def _observe_prefixed(
    client: EvaluationClient, tokenizer: Tokenizer, arm: Arm, task: Task, advance: Advance
) -> Observed:
    with_prefix = replace(
        task,
        gold_only=True,
        fluency=False,
        prompts=[Item(item.place, arm.prefix + item.prompt) for item in task.prompts],
        texts=[prefixed(item, arm.prefix, tokenizer) for item in task.texts],
    )
    observed = await observe(client, arm.setting, with_prefix, advance)

    async def fluency(prompt: str, text: str) -> TextScore:
        score = await score_fluency(client, prompt, text)
        advance(f"{arm.setting.label}: fluency")
        return score

    if task.fluency:
        # After the plain prompt, as the other arms' continuations are scored.
        scores = await asyncio.gather(
            *(
                fluency(item.prompt, text)
                for item, texts in zip(task.prompts, observed.continuations, strict=True)
                for text in texts
            )
        )
        observed.fluency = [[score] for score in scores]
    return observed


def _check_tokens(
    arm: Arm, texts: Sequence[Item], base: Sequence[TextScore], found: Sequence[TextScore]
) -> None:
    for item, plain, with_prefix in zip(texts, base, found, strict=True):
        if plain.tokens != with_prefix.tokens:
            raise BenchmarkError(
                f"{item.place}: after the prefix of {arm.setting.label} the text has "
                f"{with_prefix.tokens} tokens that count, and {plain.tokens} without it"
            )
