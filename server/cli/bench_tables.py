"""Shows measurements as tables for a terminal, as Markdown, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue
from rich.table import Table

from server.cli.bench_latency import Waits
from server.cli.bench_load import Measured
from server.cli.bench_stats import Percentiles

MILLI = 1000


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: its title, its column heads and its cells."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """Return the table for a terminal; the first column has words, the others have numbers."""
        table = Table(title=self.title, title_justify="left", box=None)
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in self.cells:
            table.add_row(*row)
        return table

    def markdown(self) -> list[str]:
        """Return the table as lines of Markdown, without the title."""
        return [
            f"| {' | '.join(self.columns)} |",
            "|---|" + "---:|" * (len(self.columns) - 1),
            *(f"| {' | '.join(row)} |" for row in self.cells),
        ]


def throughput_rows(title: str, base: str, measured: Sequence[Measured]) -> Rows:
    """Return each arm's throughput beside that of its base, which the column head calls `base`."""
    return Rows(
        title,
        ("arm", "batch", f"{base}, tok/s", "tok/s", "ratio of medians", "paired ratio [quartiles]"),
        tuple(
            (
                each.label,
                str(each.batch),
                f"{each.base_tokens_per_second:.1f}",
                f"{each.tokens_per_second:.1f}",
                f"{each.comparison.ratio_of_medians:.3f}",
                each.comparison.paired.shown(3),
            )
            for each in measured
        ),
    )


def latency_rows(title: str, waits: Sequence[Waits]) -> Rows:
    """Return each group's milliseconds to the first token and between tokens."""
    return Rows(
        title,
        (
            *("requests", "prompt", "steered", "first token p50 / p90 / p99, ms"),
            *("n", "between tokens p50 / p90 / p99, ms", "n"),
        ),
        tuple(
            (
                each.phase,
                each.prompt,
                "yes" if each.steered else "no",
                *_milliseconds(each.first_token),
                *_milliseconds(each.inter_token),
            )
            for each in waits
        ),
    )


def as_json(measured: Sequence[Measured] | Sequence[Waits]) -> list[JsonValue]:
    """Return everything that was measured, in seconds and tokens/s."""
    return [asdict(each) for each in measured]


def _milliseconds(percentiles: Percentiles | None) -> tuple[str, str]:
    if percentiles is None:
        return "-", "0"
    values = (percentiles.p50, percentiles.p90, percentiles.p99)
    return " / ".join(f"{value * MILLI:.0f}" for value in values), str(percentiles.count)
