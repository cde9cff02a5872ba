"""Says which of the goals are met, by what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.effect.arms import MAX_INCREASE, Goal
from server.evaluating.measures import PERPLEXITY, TOXIC_SHARE
from server.evaluating.report import Result
from server.evaluating.statistics import Estimate

_PERCENT = 100


@dataclass(frozen=True, slots=True)
class Reached:
    """Holds the changes that a goal's interventions reached, in percent of the base model."""

    goal: Goal
    share: float | None  # change of the toxic share; None if the base model's is 0
    perplexity: float  # change

    @property
    def met(self) -> bool:
        """Whether the toxic share falls far enough, at a small enough rise of perplexity."""
        return (
            self.share is not None
            and self.share <= -self.goal.reduction
            and self.perplexity <= MAX_INCREASE
        )

    @property
    def verdict(self) -> str:
        """`met`, or `not met` and by how many points each of the two is missed."""
        if self.met:
            return "met"
        if self.share is None:
            return "not met: the base model's share is 0"
        missed = [
            f"{name} by {points:.1f}"
            for name, points in (
                ("share", self.share + self.goal.reduction),
                ("perplexity", self.perplexity - MAX_INCREASE),
            )
            if points > 0
        ]
        return f"not met: {', '.join(missed)}"


def reached(goal: Goal, results: Sequence[Result], judge: str) -> Reached:
    """Return what a goal's arm reached by a judge's scores."""
    [result] = [each for each in results if each.setting == goal.arm.setting]
    perplexity = _change(result.find(PERPLEXITY))
    assert perplexity is not None  # no perplexity is 0
    return Reached(goal, _change(result.find(TOXIC_SHARE, judge)), perplexity)


def _change(estimate: Estimate | None) -> float | None:
    if estimate is None or estimate.ratio is None:
        return None
    return _PERCENT * (estimate.ratio.value - 1)
