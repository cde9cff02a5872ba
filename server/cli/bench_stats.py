"""Medians and spreads of measurements, by which a reader can tell a cost from noise."""

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
        """Compute the spread of at least one value."""
        low, median, high = _quantiles(values, (25, 50, 75))
        return cls(median, low, high, len(values))

    def times(self, factor: float) -> "Spread":
        """Return the spread in another unit; `factor` is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)

    def shown(self, digits: int) -> str:
        """Format the median and, in brackets, the quartiles."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The 50th, 90th and 99th percentiles of some values, and the number of values."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """Compute the percentiles of at least one value."""
        p50, p90, p99 = _quantiles(values, (50, 90, 99))
        return cls(p50, p90, p99, len(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares one arm with its base, by equal work that was measured in pairs.

    Ratios are of speeds, other ÷ base: 0.98 is two percent slower. `paired` is the spread of the
    ratios within the pairs, which a change in the machine's speed disturbs least.
    """

    base_seconds: Spread
    other_seconds: Spread
    ratio_of_medians: float
    paired: Spread

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Comparison":
        """Compare the arms by at least one pair; no time may be zero."""
        base = Spread.of([before for before, _ in pairs])
        other = Spread.of([after for _, after in pairs])
        ratios = Spread.of([before / after for before, after in pairs])
        return cls(base, other, base.median / other.median, ratios)


def _quantiles(values: Sequence[float], percents: Sequence[int]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * len(percents)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in percents]
