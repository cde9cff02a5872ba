"""Tests of the ranges of the gates' settings."""

from dataclasses import replace
from typing import Any

import pytest

from steering.fit import FitError
from steering.fit.gate_settings import GateSettings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("components", 0, "components"),
        ("l2", 0.0, "l2"),
        ("l2", float("nan"), "l2"),
        ("l2", float("inf"), "l2"),
        ("held_out", 0.0, "held out"),
        ("held_out", 1.0, "held out"),
        ("held_out", float("nan"), "held out"),
        ("seed", -1, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(FitError, match=message):
        replace(GateSettings(), **{field: value})
