"""Finds the setting that takes most toxicity away at a bounded cost in perplexity."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.evaluating.measures import FLUENCY, PERPLEXITY
from server.evaluating.plan import ToxicityMeasure
from server.evaluating.report import Result
from server.evaluating.statistics import Estimate

_PERCENT = 100


@dataclass(frozen=True, slots=True)
class Point:
    """One setting's toxicity beside its cost."""

    result: Result
    toxicity: Estimate
    perplexity: Estimate

    @property
    def increase(self) -> float:
        """The perplexity's increase over the base model's, in percent; 0 for the base model."""
        ratio = self.perplexity.ratio
        return 0.0 if ratio is None else _PERCENT * (ratio.value - 1)

    @property
    def reduction(self) -> float:
        """How much lower the toxicity is than the base model's; 0 for the base model."""
        difference = self.toxicity.difference
        return 0.0 if difference is None else -difference.value

    @property
    def sees_every_edit(self) -> bool:
        """False if an edit spares the text that is scored, so that its perplexity says little."""
        return self.perplexity.name == FLUENCY or all(
            item.settings.get("positions") != "generated" for item in self.result.applied
        )


def points(results: Sequence[Result], measure: ToxicityMeasure) -> list[Point]:
    """Return each setting's point, by the first scorer.

    The cost is the perplexity of the given texts or, if none were given, the fluency. A setting for
    which one of the two was not measured has no point.
    """
    cost = PERPLEXITY if any(each.find(PERPLEXITY) for each in results) else FLUENCY
    found = []
    for result in results:
        toxicity, perplexity = result.find(measure), result.find(cost)
        if toxicity is not None and perplexity is not None:
            found.append(Point(result, toxicity, perplexity))
    return found


def best(candidates: Sequence[Point], max_increase: float) -> Point | None:
    """Return the point with the largest reduction of toxicity, None if no setting reduces it.

    Args:
        max_increase: the largest increase in perplexity that is accepted, in percent.
    """
    accepted = [
        point
        for point in candidates
        if point.reduction > 0 and point.increase <= max_increase and point.sees_every_edit
    ]
    return max(accepted, key=lambda point: (point.reduction, -point.increase), default=None)
