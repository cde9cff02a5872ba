"""The results of an evaluation, as tables and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from pydantic import JsonValue

from server.evaluating.answers import Applied
from server.evaluating.measures import (
    ACCURACY,
    ANY_TOXIC,
    EXPECTED_MAXIMUM,
    FLUENCY,
    PERPLEXITY,
    TRUE_MASS,
)
from server.evaluating.settings import Setting
from server.evaluating.statistics import Estimate, Interval
from server.measuring.table import Table

_PERCENT: Final = 100


@dataclass(frozen=True, slots=True)
class Result:
    """One setting's estimates, and what the server says that it applied."""

    setting: Setting
    applied: Sequence[Applied]
    estimates: Sequence[Estimate]

    def find(self, name: str, subject: str | None = None) -> Estimate | None:
        """Return the estimate of this name, of the first subject if None; None if there is none."""
        return next(
            (
                each
                for each in self.estimates
                if each.name == name and subject in (None, each.subject)
            ),
            None,
        )

    def json(self) -> dict[str, JsonValue]:
        """Return the result as JSON; differences and ratios are to the base model."""
        return {
            "label": self.setting.label,
            "steering": self.setting.steering,
            "curve": self.setting.curve,
            "applied": [item.model_dump() for item in self.applied],
            "measures": [asdict(each) for each in self.estimates],
        }


def tables(results: Sequence[Result], samples: int) -> list[Table]:
    """Return a table for each scorer or file: a row a setting, a value and a change a measure."""
    subjects = dict.fromkeys(each.subject for result in results for each in result.estimates)
    return [_table(results, subject, samples) for subject in subjects]


def _table(results: Sequence[Result], subject: str, samples: int) -> Table:
    # With one sample of each prompt, these are the mean and the share once more.
    left_out = () if samples > 1 else (EXPECTED_MAXIMUM, ANY_TOXIC)
    names = dict.fromkeys(
        each.name
        for result in results
        for each in result.estimates
        if each.subject == subject and each.name not in left_out
    )
    units = max(
        each.units for result in results for each in result.estimates if each.subject == subject
    )
    columns = ["setting"]
    for name in names:
        columns += [f"{name} [95 %]", "change [95 %]"]
    rows = []
    for result in results:
        row = [result.setting.label]
        for name in names:
            row += _cells(result.find(name, subject))
        rows.append(row)
    return Table(f"{subject} ({units} units)", columns, rows)


def _cells(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "-", "-"
    if estimate.name in (ACCURACY, TRUE_MASS):
        value = _shown(estimate.value, 1, _PERCENT, " %")
        return value, _shown(estimate.difference, 1, _PERCENT, " points", signed=True)
    value = (
        _shown(estimate.value, 2)
        if estimate.name in (PERPLEXITY, FLUENCY)
        else _shown(estimate.value, 1, _PERCENT, " %")
    )
    return value, _shown(_change(estimate.ratio), 1, _PERCENT, " %", signed=True)


def _change(ratio: Interval | None) -> Interval | None:
    if ratio is None:
        return None
    ends = (None if end is None else end - 1 for end in (ratio.low, ratio.high))
    return Interval(ratio.value - 1, *ends)


def _shown(
    interval: Interval | None,
    digits: int,
    factor: float = 1,
    unit: str = "",
    *,
    signed: bool = False,
) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    value, *ends = (
        "?" if number is None else f"{number * factor:{sign}.{digits}f}"
        for number in (interval.value, interval.low, interval.high)
    )
    return f"{value}{unit} [{', '.join(ends)}]"
