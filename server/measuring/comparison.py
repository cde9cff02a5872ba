"""Medians and spreads of measurements, by which a reader can tell a cost from noise."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

T = TypeVar("T")


def turns(trials: Sequence[T], rounds: int) -> Iterator[tuple[T, bool]]:
    """Yield each trial once in every round, and whether its measurement counts.

    Every other round has the opposite order, so that a drift of the machine's speed favors no
    trial. One more round comes first: it warms up, and does not count.
    """
    for number in range(rounds + 1):
        for trial in trials[:: -1 if number % 2 else 1]:
            yield trial, number > 0


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, with the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Compute the spread of at least one value."""
        low, median, high = _percentiles(values, (25, 50, 75))
        return cls(median, low, high, len(values))

    def shown(self, digits: int, factor: float = 1) -> str:
        """Format the median and, in brackets, the quartiles, each multiplied by `factor`."""
        median, low, high = (
            f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high)
        )
        return f"{median} [{low}, {high}]"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The 50th, 90th and 99th percentiles of some values, and the number of values."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Compute the percentiles of at least one value."""
        p50, p90, p99 = _percentiles(values, (50, 90, 99))
        return cls(p50, p90, p99, len(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares a trial with its base, by equal work that both did in the same rounds.

    Ratios are of speeds, trial ÷ base: 0.98 is two percent slower. `paired` is the spread of the
    ratios within the rounds, which a change in the machine's speed disturbs least.
    """

    base_seconds: Spread
    other_seconds: Spread
    ratio_of_medians: float
    paired: Spread

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float]) -> Self:
        """Compare the seconds of each round; there is at least one round, and no time is zero."""
        before, after = Spread.of(base), Spread.of(other)
        ratios = [b / o for b, o in zip(base, other, strict=True)]
        return cls(before, after, before.median / after.median, Spread.of(ratios))


@dataclass(frozen=True, slots=True)
class Throughput:
    """The throughput of a trial beside that of its base, summed over all requests of a batch."""

    label: str
    batch: int
    base_tokens_per_second: float
    tokens_per_second: float
    comparison: Comparison

    @classmethod
    def of(
        cls, label: str, batch: int, tokens: int, base: Sequence[float], other: Sequence[float]
    ) -> Self:
        """Compare the seconds that a trial and its base took for `tokens` tokens in each round."""
        comparison = Comparison.of(base, other)
        before, after = comparison.base_seconds.median, comparison.other_seconds.median
        return cls(label, batch, tokens / before, tokens / after, comparison)


def _percentiles(values: Sequence[float], percents: Sequence[int]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * len(percents)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in percents]
