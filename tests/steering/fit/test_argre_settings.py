"""Tests that settings of an ARGRE fit are refused out of their range."""

from dataclasses import replace
from typing import Any

import pytest

from steering.fit import FitError
from steering.fit.argre_settings import ArgreSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_units", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("interpolations", -1),
        ("warmup_steps", -1),
        ("seed", -1),
        ("beta", 0.0),
        ("learning_rate", float("nan")),
        ("center", -1.0),
        ("weight_decay", float("nan")),
        ("center", float("inf")),
        ("neutral_weight", -1.0),
        ("direction", "first"),
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("held_out", float("nan")),
        ("reward_quantile", 1.5),
        ("reward_quantile", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(FitError, match=field):
        replace(ArgreSettings(), **{field: value})
