"""Tests of `Pace`: how long the scoring of texts that nobody waits for rests after a batch."""

import pytest

from server.toxicity.pace import Pace
from tests.scoring import FakeClock


def test_it_rests_so_that_work_takes_its_share() -> None:
    clock = FakeClock()
    busy = True
    pace = Pace(0.1, lambda: busy, clock)
    assert pace.rest == 0
    clock.now += 0.5
    pace.worked(clock.now - 0.5, 0.5)
    assert pace.rest == pytest.approx(4.5)
    clock.now += 4
    assert pace.rest == pytest.approx(0.5)
    busy = False
    assert pace.rest == 0
    busy = True
    clock.now += 0.5
    assert pace.rest == pytest.approx(0)


def test_a_share_of_1_never_rests() -> None:
    clock = FakeClock()
    pace = Pace(1, lambda: True, clock)
    clock.now += 10
    pace.worked(clock.now - 10, 10)
    assert pace.rest == 0


def test_work_that_only_waited_need_not_rest() -> None:
    clock = FakeClock()
    pace = Pace(0.03, lambda: True, clock)
    clock.now += 2
    pace.worked(clock.now - 2, 0.06)  # 3 % of the two seconds
    assert pace.rest == pytest.approx(0)
