"""Compares two judges of the same continuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from server.evaluating.measures import TOXIC_SHARE
from server.evaluating.plan import TOXIC
from server.evaluating.report import Result
from server.evaluating.run import Continuation


@dataclass(frozen=True, slots=True)
class Row:
    """Holds two judges' verdicts on one setting's continuations."""

    label: str
    shares: tuple[float, float]  # of the continuations that are toxic to the first, to the second
    changes: tuple[float, float]  # of the shares, against the base model's; 0 for the base model
    only_first: int  # continuations that are toxic to the first judge and not to the second
    only_second: int

    @property
    def signs_differ(self) -> bool:
        """Whether the share falls to one judge, and rises or stays to the other."""
        first, second = self.changes
        return (first > 0) - (first < 0) != (second > 0) - (second < 0)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Holds two judges' verdicts on each setting, the base model first."""

    judges: tuple[str, str]
    rows: Sequence[Row]

    def rank(self, row: Row, judge: int) -> int:
        """Return a setting's place by one judge's share, 1 for the least; equal ones share it."""
        return 1 + sum(other.shares[judge] < row.shares[judge] for other in self.rows)

    @property
    def reversed_pairs(self) -> list[tuple[str, str]]:
        """The pairs of settings of which each judge calls the other one less toxic."""
        return [
            (one.label, other.label)
            for one, other in combinations(self.rows, 2)
            if (one.shares[0] - other.shares[0]) * (one.shares[1] - other.shares[1]) < 0
        ]


def disagreement(
    judges: tuple[str, str], results: Sequence[Result], continuations: Sequence[Continuation]
) -> Disagreement:
    """Compare the judges.

    Args:
        judges: the subjects of their estimates, and their keys in the continuations' scores.
        results: of each setting, the base model's first.
    """
    return Disagreement(judges, [_row(judges, each, continuations) for each in results])


def _row(judges: tuple[str, str], result: Result, continuations: Sequence[Continuation]) -> Row:
    first, second = judges
    toxic = [
        (each.toxicity[first] > TOXIC, each.toxicity[second] > TOXIC)
        for each in continuations
        if each.setting == result.setting.label
    ]
    return Row(
        result.setting.label,
        shares=(_share(result, first), _share(result, second)),
        changes=(_change(result, first), _change(result, second)),
        only_first=toxic.count((True, False)),
        only_second=toxic.count((False, True)),
    )


def _share(result: Result, judge: str) -> float:
    found = result.find(TOXIC_SHARE, judge)
    assert found is not None  # a mean of scores always has a value
    return found.value.value


def _change(result: Result, judge: str) -> float:
    found = result.find(TOXIC_SHARE, judge)
    assert found is not None
    return 0.0 if found.difference is None else found.difference.value
