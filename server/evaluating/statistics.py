"""Estimates with paired bootstrap intervals.

Every measure here is a ratio of two sums over units (prompts, texts or questions), for perplexity
the exponential of one. A resample draws as many units as there are, with replacement; the same
units are drawn for every setting, so that differences between settings are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

RESAMPLES: Final = 2000
_QUANTILES: Final = (0.025, 0.975)  # a 95 % interval
# Resamples without a value (a ratio to 0) are left out. With fewer others than this share, there is
# no interval.
_LEAST_FINITE: Final = 0.975


@dataclass(frozen=True, slots=True)
class Quantity:
    """Holds one setting's measurements, one for each unit.

    The measure is sum(numerators) / sum(denominators), or the exponential of that.
    """

    name: str
    subject: str  # the scorer or the file that it is about
    numerators: Sequence[float]
    denominators: Sequence[float]
    exponential: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """The name and the subject; quantities of two settings with equal keys are comparable."""
        return self.name, self.subject


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its 95 % interval, None if too many resamples have no value."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measure with one setting, and its difference and ratio to the base model's."""

    name: str
    subject: str
    units: int
    value: Interval
    difference: Interval | None = None  # None for the base model itself
    ratio: Interval | None = None  # None also if the base model's value is 0


class Bootstrap:
    """Draws resamples; the same seed and number of units give the same ones."""

    def __init__(self, seed: int, resamples: int = RESAMPLES) -> None:
        self._seed = seed
        self._resamples = resamples
        self._drawn: dict[int, Array] = {}

    def counts(self, units: int) -> Array:
        """Return how often each unit is in each resample, (resamples, units)."""
        if units not in self._drawn:
            generator = np.random.default_rng(self._seed)
            drawn = generator.multinomial(units, np.full(units, 1 / units), size=self._resamples)
            self._drawn[units] = drawn.astype(np.float64)
        return self._drawn[units]

    def estimate(self, quantity: Quantity, base: Quantity | None) -> Estimate | None:
        """Estimate a measure, and compare it with the base model's; None if it has no value.

        Args:
            base: the same measure of the base model, with the same units; None for the base model.
        """
        value, resampled = self._values(quantity)
        if not np.isfinite(value):
            return None
        name, subject, units = quantity.name, quantity.subject, len(quantity.numerators)
        found = Estimate(name, subject, units, _interval(value, resampled))
        if base is None:
            return found
        base_value, base_resampled = self._values(base)
        if not np.isfinite(base_value):
            return found
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = resampled / base_resampled
        return Estimate(
            *(name, subject, units, found.value),
            difference=_interval(value - base_value, resampled - base_resampled),
            ratio=_interval(value / base_value, ratios) if base_value else None,
        )

    def _values(self, quantity: Quantity) -> tuple[float, Array]:
        """Return the measure, and the measure in each resample, (resamples,); NaN is no value."""
        numerators = np.asarray(quantity.numerators, np.float64)
        denominators = np.asarray(quantity.denominators, np.float64)
        counts = self.counts(len(numerators))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = np.divide(numerators.sum(), denominators.sum())
            resampled = (counts @ numerators) / (counts @ denominators)
            if quantity.exponential:
                value, resampled = np.exp(value), np.exp(resampled)
        return float(value), resampled


def _interval(value: float, resampled: Array) -> Interval:
    finite = resampled[np.isfinite(resampled)]
    if len(finite) < _LEAST_FINITE * len(resampled):
        return Interval(value, None, None)
    low, high = np.quantile(finite, _QUANTILES)
    return Interval(value, float(low), float(high))
