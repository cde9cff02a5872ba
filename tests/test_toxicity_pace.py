import time

import pytest

from server.toxicity.pace import Pace


def test_it_rests_so_that_work_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    busy = True
    pace = Pace(0.1, lambda: busy)
    assert pace.rest == 0
    pace.worked(0.5)
    assert pace.rest == pytest.approx(4.5)
    now += 4
    assert pace.rest == pytest.approx(0.5)
    busy = False
    assert pace.rest == 0
    busy = True
    now += 0.5
    assert pace.rest == pytest.approx(0)


def test_a_share_of_1_never_rests() -> None:
    pace = Pace(1, lambda: True)
    pace.worked(10)
    assert pace.rest == 0
