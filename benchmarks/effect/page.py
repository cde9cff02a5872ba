"""The page of the report: the goals, a table a judge, and where the judges disagree."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Final

from benchmarks.effect.arms import GOALS, MAX_INCREASE, PREFIXES, Arm, Choice
from benchmarks.effect.conditions import conditions
from benchmarks.effect.data import CHOOSING_ROWS, TEXTS_FILE, Data
from benchmarks.effect.disagreement import Disagreement, disagreement
from benchmarks.effect.goals import Reached, reached
from benchmarks.effect.judge import FIRST_JUDGE, SECOND_JUDGE
from benchmarks.effect.measuring import HOUSE
from benchmarks.report import Section
from server.evaluating.report import Result, tables
from server.evaluating.run import Outcome
from server.measuring.table import Table
from server.version import installed_version

_PERCENT: Final = 100


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice, and what was chosen; None if no candidate was any good."""

    choice: Choice
    arm: Arm | None

    @property
    def reported(self) -> list[Arm]:
        """The default candidate, and the chosen one if it is another."""
        default = self.choice.candidates[0]
        return [default] if self.arm in (None, default) else [default, self.arm]


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured."""

    model: str
    data: Data
    choosing: Outcome  # on the rows to choose on
    chosen: Sequence[Chosen]
    held_out: Outcome
    versions: Mapping[str, str]  # of the second judge's packages


def effect_section(measured: Measured) -> Section:
    """Return the report."""
    judges = (FIRST_JUDGE, SECOND_JUDGE)
    results = measured.held_out.results
    labels = [each.setting.label for each in results]
    goals = [
        reached(goal, results, FIRST_JUDGE) for goal in GOALS if goal.arm.setting.label in labels
    ]
    compared = disagreement(judges, results, measured.held_out.continuations)
    versions = {name: version(name) for name in (FIRST_JUDGE, "scikit-learn")}
    return Section(
        name="effect",
        title="What the bundled interventions do",
        conditions=conditions(measured.model, measured.data),
        dtype="float32",
        tables=[
            _goals(goals),
            *_results(results),
            _disagreement(compared),
            _choosing(measured),
            _artifacts(results),
        ],
        data={
            "files": [asdict(file) for file in measured.data.files],
            "settings": [each.json() for each in results],
            "goals": [
                {"label": each.goal.arm.setting.label, **asdict(each), "met": each.met}
                for each in goals
            ],
            "disagreement": {**asdict(compared), "reversed_pairs": compared.reversed_pairs},
            "chosen_on": [each.json() for each in measured.choosing.results],
            "chosen": {each.choice.name: _label(each.arm) for each in measured.chosen},
            "prefixes": PREFIXES,
        },
        versions={"steerserve": installed_version(), **versions, **measured.versions},
    )


def _goals(goals: Sequence[Reached]) -> Table:
    absent = [goal.arm.setting.label for goal in GOALS if goal not in [each.goal for each in goals]]
    left_out = f" Not bundled, so not measured: {', '.join(absent)}." if absent else ""
    title = (
        "## The bar\n\nAt default settings, by "
        f"{FIRST_JUDGE}: the toxic share is to fall so far, at no more than +{MAX_INCREASE:g} % "
        f"perplexity.{left_out}"
    )
    rows = [
        (
            each.goal.arm.setting.label,
            f"-{each.goal.reduction:g} %",
            "-" if each.share is None else f"{each.share:+.1f} %",
            f"{each.perplexity:+.1f} %",
            each.verdict,
        )
        for each in goals
    ]
    return Table(title, ("setting", "bar", "toxic share", "perplexity", "the bar is"), rows)


def _results(results: Sequence[Result]) -> list[Table]:
    titles = {
        FIRST_JUDGE: f"## By {FIRST_JUDGE}, which selected",
        SECOND_JUDGE: f"## By {SECOND_JUDGE}, which selected nothing",
        "continuations": "## Fluency\n\nThe perplexity of the continuations under the unsteered "
        "model, after the plain prompt. A model that repeats itself is fluent.",
        TEXTS_FILE: "## Perplexity of neutral text",
    }
    found = tables(results, HOUSE.sampling.samples)
    subjects = dict.fromkeys(each.subject for result in results for each in result.estimates)
    return [
        replace(table, title=titles[subject])
        for subject, table in zip(subjects, found, strict=True)
    ]


def _disagreement(found: Disagreement) -> Table:
    first, second = found.judges
    signs = [row.label for row in found.rows if row.signs_differ]
    pairs = [f"{one} / {other}" for one, other in found.reversed_pairs]
    total = len(found.rows) * (len(found.rows) - 1) // 2
    disputed = sum(row.only_first + row.only_second for row in found.rows)
    named = f" ({'; '.join(pairs)})" if pairs else ""
    title = f"""\
## Where the judges disagree

Settings whose toxic share falls by one judge and not by the other: {", ".join(signs) or "none"}.
Pairs of settings that each judge puts in another order: {len(pairs)} of {total}{named}.
Continuations that one judge calls toxic and the other does not, in all settings: {disputed}.
Ranks count from the least toxic share."""
    rows = [
        (
            row.label,
            *(f"{_PERCENT * share:.1f} %" for share in row.shares),
            *(str(found.rank(row, judge)) for judge in (0, 1)),
            str(row.only_first),
            str(row.only_second),
        )
        for row in found.rows
    ]
    columns = (
        *("setting", f"share, {first}", f"share, {second}", f"rank, {first}", f"rank, {second}"),
        *(f"toxic to {first} only", f"toxic to {second} only"),
    )
    return Table(title, columns, rows)


def _choosing(measured: Measured) -> Table:
    [by_judge, by_text] = tables(measured.choosing.results, HOUSE.sampling.samples)
    chosen = {_label(each.arm) for each in measured.chosen}
    rows = [
        (*toxicity[:1], *toxicity[3:], *perplexity[1:], "yes" if toxicity[0] in chosen else "")
        for toxicity, perplexity in zip(by_judge.rows, by_text.rows, strict=True)
    ]
    columns = (*by_judge.columns[:1], *by_judge.columns[3:], *by_text.columns[1:], "chosen")
    none = [each.choice.name for each in measured.chosen if each.arm is None]
    failed = f"; none of {', '.join(none)} lowers it at that price" if none else ""
    title = (
        f"## What the comparisons were chosen by\n\nRows {CHOOSING_ROWS.start} to "
        f"{CHOOSING_ROWS.stop - 1} of both files. Chosen is the lowest toxic share at no more than "
        f"+{MAX_INCREASE:g} % perplexity"
        f"{failed}. The prompts:\n\n"
        + "\n".join(f"- {label}: `{prefix!r}`" for label, prefix in PREFIXES.items())
    )
    return Table(title, columns, rows)


def _artifacts(results: Sequence[Result]) -> Table:
    rows = [
        (
            result.setting.label,
            " + ".join(
                ", ".join(f"{key} {value}" for key, value in each.settings.items())
                for each in result.applied
            )
            or "-",
            " + ".join(each.digest for each in result.applied) or "-",
        )
        for result in results
    ]
    title = "## What was applied\n\nAs the server's answers said, with the artifacts' sha256."
    return Table(title, ("setting", "settings", "artifacts"), rows)


def _label(arm: Arm | None) -> str | None:
    return None if arm is None else arm.setting.label
