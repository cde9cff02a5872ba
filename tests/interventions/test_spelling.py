"""Tests of the hint for a misspelt name, and that a long name costs no time."""

from pathlib import Path

import pytest

from interventions import spelling
from interventions.spelling import nearest_name

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("strenght", "strength"),
        ("zzz", None),
        ("", None),
        ("strength" * 12, None),
    ],
)
def test_the_nearest_name(name: str, nearest: str | None) -> None:
    assert nearest_name(name, ("strength", "positions")) == nearest


def test_what_is_too_long_for_a_name_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(name: str, known: object, **_: float) -> list[str]:
        compared.append(len(name))
        return []

    monkeypatch.setattr(spelling, "get_close_matches", compare)
    for length in (99, 100, 101, 4_000_000):
        assert nearest_name("s" * length, ("strength",)) is None
    assert compared == [99, 100]


def test_nobody_else_compares_names() -> None:
    sources = (
        path
        for package in ("server", "interventions", "steering")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    users = [path.name for path in sources if "difflib" in path.read_text(encoding="utf-8")]
    assert users == ["spelling.py"]
