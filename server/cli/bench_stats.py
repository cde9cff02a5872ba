"""Medians and how far measurements spread, so that a reader can tell a cost from noise."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Pair: TypeAlias = tuple[float, float]
"""Seconds that the base took, and seconds that the other arm took close to it in time."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, with the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        low, median, high = _quantiles(values, (25, 50, 75))
        return cls(median, low, high, len(values))

    def times(self, factor: float) -> "Spread":
        """In another unit; `factor` is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)

    def shown(self, digits: int) -> str:
        """The median and, in brackets, the quartiles."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How long something takes mostly, and at worst."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """Of at least one value."""
        p50, p90, p99 = _quantiles(values, (50, 90, 99))
        return cls(p50, p90, p99, len(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm beside its base, by equal work that was measured in pairs.

    Ratios are of speeds, other ÷ base: 0.98 is two percent slower. `paired` is the ratio within
    each pair, which a machine that drifts disturbs least.
    """

    base_seconds: Spread
    other_seconds: Spread
    ratio_of_medians: float
    paired: Spread

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Comparison":
        """Of at least one pair; no seconds are zero."""
        base = Spread.of([before for before, _ in pairs])
        other = Spread.of([after for _, after in pairs])
        ratios = Spread.of([before / after for before, after in pairs])
        return cls(base, other, base.median / other.median, ratios)


def _quantiles(values: Sequence[float], percents: Sequence[int]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * len(percents)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in percents]
