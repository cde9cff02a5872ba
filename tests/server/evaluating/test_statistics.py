"""Tests of the bootstrap against a slow reference that repeats every unit it has drawn."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from server.evaluating.statistics import Bootstrap, Interval, Quantity

BASE = Quantity("toxic share", "embedded", [1.0, 0.0, 1.0, 1.0], [1.0] * 4)
STEERED = Quantity("toxic share", "embedded", [0.0, 0.0, 1.0, 0.0], [1.0] * 4)


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolate between the two order statistics around a quantile."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def measure(quantity: Quantity, units: Sequence[int]) -> float:
    """Compute a measure of some units, which may repeat."""
    numerator = math.fsum(quantity.numerators[unit] for unit in units)
    ratio = numerator / math.fsum(quantity.denominators[unit] for unit in units)
    return math.exp(ratio) if quantity.exponential else ratio


def resamples(seed: int, units: int, number: int) -> list[list[int]]:
    """Draw resamples as the documentation says, as lists of units."""
    counts = np.random.default_rng(seed).multinomial(units, [1 / units] * units, size=number)
    return [[unit for unit in range(units) for _ in range(row[unit])] for row in counts]


def check(interval: Interval | None, value: float, resampled: Sequence[float]) -> None:
    assert interval is not None
    assert interval.value == pytest.approx(value)
    assert interval.low == pytest.approx(quantile(resampled, 0.025))
    assert interval.high == pytest.approx(quantile(resampled, 0.975))


def test_perplexity_and_its_changes_equal_the_slow_reference() -> None:
    tokens = [3.0, 1.0, 7.0, 2.0, 5.0]
    base = Quantity("perplexity", "wiki", [9.0, 2.0, 22.0, 7.0, 14.0], tokens, exponential=True)
    own = Quantity("perplexity", "wiki", [9.5, 2.5, 21.0, 8.0, 15.0], tokens, exponential=True)
    found = Bootstrap(seed=7, resamples=500).estimate(own, base)
    assert found is not None
    assert found.units == 5
    pairs = [(measure(own, units), measure(base, units)) for units in resamples(7, 5, 500)]
    value, other = math.exp(56 / 18), math.exp(54 / 18)
    check(found.value, value, [own for own, _ in pairs])
    check(found.difference, value - other, [own - base for own, base in pairs])
    check(found.ratio, value / other, [own / base for own, base in pairs])


def test_differences_are_paired() -> None:
    shifted = Quantity("x", "y", [value - 0.5 for value in BASE.numerators], BASE.denominators)
    found = Bootstrap(seed=0).estimate(shifted, BASE)
    assert found is not None
    assert found.difference is not None
    # Every unit has the same difference, so it has no spread, though both measures have one.
    assert found.difference.low == pytest.approx(-0.5)
    assert found.difference.high == pytest.approx(-0.5)
    assert found.value.low != found.value.high


def test_the_base_has_no_changes() -> None:
    found = Bootstrap(seed=0).estimate(BASE, None)
    assert found is not None
    assert found.value.value == 0.75
    assert (found.difference, found.ratio) == (None, None)


def test_a_ratio_to_zero_has_no_interval() -> None:
    zero = Quantity("toxic share", "embedded", [0.0] * 4, [1.0] * 4)
    found = Bootstrap(seed=0).estimate(STEERED, zero)
    assert found is not None
    assert found.ratio is None
    assert found.difference is not None
    # A third of the resamples of this base have no toxic unit.
    rare = Bootstrap(seed=0).estimate(BASE, STEERED)
    assert rare is not None
    assert rare.ratio == Interval(3.0, None, None)


def test_a_few_resamples_without_a_ratio_are_left_out() -> None:
    base = Quantity("toxic share", "embedded", [1.0] * 4 + [0.0] * 3, [1.0] * 7)
    own = Quantity("toxic share", "embedded", [1.0] * 2 + [0.0] * 5, [1.0] * 7)
    pairs = [(measure(own, units), measure(base, units)) for units in resamples(0, 7, 2000)]
    without = sum(base == 0 for _, base in pairs)
    assert 0 < without < 0.025 * 2000
    found = Bootstrap(seed=0).estimate(own, base)
    assert found is not None
    check(found.ratio, 0.5, [own / base for own, base in pairs if base])


def test_what_has_no_token_has_no_value() -> None:
    nothing = Quantity("fluency", "continuations", [0.0, 0.0], [0.0, 0.0], exponential=True)
    some = Quantity("fluency", "continuations", [2.0, 0.0], [1.0, 0.0], exponential=True)
    bootstrap = Bootstrap(seed=0)
    assert bootstrap.estimate(nothing, None) is None
    found = bootstrap.estimate(some, nothing)
    assert found is not None
    assert found.value.value == pytest.approx(math.exp(2))
    assert (found.value.low, found.value.high, found.ratio) == (None, None, None)


def test_the_seed_decides() -> None:
    first, again = (Bootstrap(seed).estimate(STEERED, BASE) for seed in (1, 1))
    assert first == again
    assert Bootstrap(1).counts(4).tolist() != Bootstrap(2).counts(4).tolist()
    assert Bootstrap(3).counts(6).sum(axis=1).tolist() == [6.0] * 2000
