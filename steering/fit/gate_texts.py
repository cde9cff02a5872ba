"""Splits the sentences of a fit of gates into those to learn from and those to test on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steering.fit import FitError
from steering.fit.activations import TokenIds
from steering.fit.gate_settings import GateSettings


@dataclass(frozen=True, slots=True)
class GateTexts:
    """The distinct sentences of both sides, split into those to learn from and those to test on."""

    source: list[TokenIds]
    control: list[TokenIds]
    held_out_source: list[TokenIds]
    held_out_control: list[TokenIds]


def split_texts(
    source: Sequence[TokenIds], control: Sequence[TokenIds], settings: GateSettings
) -> GateTexts:
    """Split source and control, each after its repeated sentences were left out.

    Repeated sentences could otherwise be learnt from and tested on.

    Raises:
        FitError: a sentence has no token, a side has fewer than two different sentences, a sentence
            is on both sides, or too few are left to learn `settings.components` from.
    """
    sides = {"source": _distinct(source, "source"), "control": _distinct(control, "control")}
    if both := len(set(sides["source"]) & set(sides["control"])):
        raise FitError(
            f"{both} of the control's {len(sides['control'])} sentences are in the source too: a "
            "gate cannot be open and closed for the same sentence"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    learnt: dict[str, list[TokenIds]] = {}
    tested: dict[str, list[TokenIds]] = {}
    for side, sentences in sides.items():
        order = torch.randperm(len(sentences), generator=generator).tolist()
        count = min(max(1, round(settings.held_out * len(sentences))), len(sentences) - 1)
        tested[side] = [sentences[row] for row in order[:count]]
        learnt[side] = [sentences[row] for row in order[count:]]
    number = len(learnt["source"]) + len(learnt["control"])
    if settings.components > number - 1:
        raise FitError(
            f"{number} sentences to learn a gate from have at most {number - 1} principal "
            f"components, and {settings.components} were asked for: give more sentences, or ask "
            "for fewer components"
        )
    return GateTexts(learnt["source"], learnt["control"], tested["source"], tested["control"])


def _distinct(sentences: Sequence[TokenIds], side: str) -> list[tuple[int, ...]]:
    distinct = list(dict.fromkeys(tuple(sentence) for sentence in sentences))
    if () in distinct:
        raise FitError(f"a sentence of the {side} has no token")
    if len(distinct) < 2:
        raise FitError(
            f"the {side} has {len(distinct)} different sentences: a gate needs at least 2 on each "
            "side, one to learn from and one to test on"
        )
    return distinct
