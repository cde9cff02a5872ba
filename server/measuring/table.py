"""Tables of measurements, as Markdown that is aligned for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.measuring.comparison import Throughput


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its title, its column heads and its rows of cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table without its title. The first column has words, the others numbers."""
        # A bar would end a cell, and a line end a row.
        cells = [
            [cell.replace("|", "/").replace("\n", " ") for cell in row]
            for row in (self.columns, *self.rows)
        ]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        heads, *lines = (
            [first.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]
            for first, *numbers in cells
        )
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))

    def page(self) -> str:
        """Return the title and the table."""
        return f"{self.title}\n\n{self.markdown()}\n"


def throughput_table(title: str, base: str, measured: Sequence[Throughput]) -> Table:
    """Return a table of throughputs beside those of their base, which is called `base`."""
    columns = (
        *("trial", "batch", f"{base}, tok/s", "tok/s"),
        *("ratio of medians", "paired ratio [quartiles]"),
    )
    rows = [
        (
            each.label,
            str(each.batch),
            f"{each.base_tokens_per_second:.1f}",
            f"{each.tokens_per_second:.1f}",
            f"{each.comparison.ratio_of_medians:.3f}",
            each.comparison.paired.shown(3),
        )
        for each in measured
    ]
    return Table(title, columns, rows)
