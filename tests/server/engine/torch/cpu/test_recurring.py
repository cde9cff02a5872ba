"""Tests which keys count as recurring: wanted often, over a while, without a long pause."""

from hypothesis import given
from hypothesis import strategies as st

from server.engine.torch.cpu import recurring
from server.engine.torch.cpu.recurring import RecurrenceCounter, RecurrenceRule


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def times(counts: RecurrenceCounter[str], key: str, number: int) -> bool:
    return [counts.count(key) for _ in range(number)][-1]


def test_it_takes_both_many_times_and_a_while() -> None:
    clock = Clock()
    counts = RecurrenceCounter[str](RecurrenceRule(times=10, seconds=60, pause=600), clock)
    assert not times(counts, "burst", 50)
    assert not times(counts, "slow", 1)
    clock.now += 60
    assert times(counts, "burst", 1)
    assert not times(counts, "slow", 8)
    assert times(counts, "slow", 1)
    counts.forget("slow")
    assert not times(counts, "slow", 10)


def test_a_long_pause_begins_the_count_anew() -> None:
    clock = Clock()
    counts = RecurrenceCounter[str](RecurrenceRule(times=10, seconds=60, pause=600), clock)
    times(counts, "x", 9)
    clock.now += 601
    assert not times(counts, "x", 20)
    clock.now += 60
    assert times(counts, "x", 1)


def test_at_once_rule_counts_the_first_use() -> None:
    assert RecurrenceCounter[str](RecurrenceRule.at_once()).count("x")


@given(st.lists(st.integers(0, 2000)))
def test_few_keys_are_remembered(keys: list[int]) -> None:
    counts = RecurrenceCounter[int](RecurrenceRule(2, 0, 1e9))
    for key in keys * 20:
        counts.count(key)
    assert len(counts._counts) <= recurring._MAX_KEYS
