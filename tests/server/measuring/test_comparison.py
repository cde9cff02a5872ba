"""Turns, medians, quartiles and ratios."""

import pytest

from server.measuring.comparison import Comparison, Percentiles, Spread, turns


def test_the_median_and_the_quartiles() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread.of([1.0, 2.0, 3.0]).shown(0, factor=1000) == "2000 [1500, 2500]"


def test_percentiles_reach_into_the_tail() -> None:
    seconds = Percentiles.of([float(value) for value in range(101)])
    assert seconds == Percentiles(50.0, 90.0, 99.0, 101)


def test_a_slower_trial_has_a_ratio_below_one() -> None:
    compared = Comparison.of([1.0, 1.0, 2.0], [2.0, 1.25, 2.5])
    assert compared.ratio_of_medians == pytest.approx(0.5)
    assert compared.paired.median == pytest.approx(0.8)
    assert compared.paired.count == 3


def test_drift_that_both_trials_share_leaves_the_paired_ratio_alone() -> None:
    compared = Comparison.of([1.0, 5.0, 3.0], [1.1, 5.5, 3.3])
    assert (compared.paired.low, compared.paired.high) == pytest.approx((1 / 1.1, 1 / 1.1))


def test_every_other_round_is_reversed_and_the_first_does_not_count() -> None:
    assert list(turns("ab", 2)) == [
        *(("a", False), ("b", False)),
        *(("b", True), ("a", True)),
        *(("a", True), ("b", True)),
    ]
