"""Says which setting is the best trade-off, and how to serve it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from pydantic import JsonValue

from server.evaluating.answers import Applied
from server.evaluating.plan import ToxicityMeasure
from server.evaluating.report import Result
from server.evaluating.tradeoff import Point, best, points

_PERCENT: Final = 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """The settings that were compared, and the best of them, if one is any good."""

    candidates: Sequence[Point]  # the base model's point first; empty if nothing can be compared
    best: Point | None
    max_increase: float  # of the perplexity, in percent

    @classmethod
    def of(cls, results: Sequence[Result], decides: ToxicityMeasure, max_increase: float) -> Self:
        """Choose the best setting by a measure of toxicity."""
        candidates = points(results, decides)
        return cls(candidates, best(candidates, max_increase), max_increase)

    @property
    def single(self) -> Applied | None:
        """The best setting's only intervention, whose settings could become its defaults."""
        applied = self.best.result.applied if self.best else ()
        return applied[0] if len(applied) == 1 else None

    def sentences(self) -> list[str]:
        """Return the verdict in sentences; none if there was nothing to choose from."""
        if len(self.candidates) < 2:
            return []
        base, *others = self.candidates
        said = [
            f"{point.result.setting.label} edits generated tokens only, so the perplexity of given "
            "texts does not show what it costs, and it cannot be the best trade-off."
            for point in others
            if not point.sees_every_edit
        ]
        bound = f"at most +{self.max_increase:g} % {base.perplexity.name}"
        if self.best is None:
            return [*said, f"No setting lowers the {base.toxicity.name} with {bound}."]
        ratio = self.best.toxicity.ratio
        lowered = _PERCENT * (ratio.value - 1) if ratio else 0.0
        said.append(
            f"Best trade-off with {bound}: {self.best.result.setting.label} "
            f"({base.toxicity.name} {lowered:+.1f} %, {base.perplexity.name} "
            f"{self.best.increase:+.1f} %)."
        )
        only = self.single
        said.append(
            f"As the server's default: --default-steering '{json.dumps(self._steering())}'"
            if only is None
            else f"As new defaults of {only.intervention}: {json.dumps(only.settings)}"
        )
        return said

    def json(self) -> JsonValue:
        """Return the verdict as JSON; null if no setting is any good."""
        if self.best is None:
            return None
        return {
            "label": self.best.result.setting.label,
            "steering": self._steering(),
            "max_perplexity_increase_percent": self.max_increase,
            "cost": self.best.perplexity.name,
            "perplexity_increase_percent": self.best.increase,
            "toxicity": self.best.toxicity.name,
            "toxicity_reduction": self.best.reduction,
        }

    def _steering(self) -> JsonValue:
        """Return the best steering with all settings, as in a request."""
        assert self.best is not None
        items: list[JsonValue] = [
            {"intervention": item.intervention, **item.settings}
            for item in self.best.result.applied
        ]
        return items[0] if len(items) == 1 else items
