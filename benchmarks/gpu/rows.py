"""Passes results from the parts of a check to their parent: rows of JSON on standard output."""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TextIO, TypeAlias

_MARK: Final = "ROW "

Value: TypeAlias = str | int | float | bool | None
Row: TypeAlias = Mapping[str, Value]


class Rows:
    """Writes rows for whoever has started this process, and remembers whether anything failed."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self.failures = 0

    def tell(self, **row: Value) -> None:
        """Write a row."""
        self._out.write(f"{_MARK}{json.dumps(row)}\n")
        self._out.flush()

    @contextmanager
    def attempt(self, **row: Value) -> Iterator[None]:
        """Write what fails in the block as a row, and go on after it."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            traceback.print_exc(file=self._out)
            self.tell(**row, failed=first_line(error))


def first_line(error: Exception) -> str:
    """Give an error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def read_row(line: str) -> Row | None:
    """The row that a line holds; None of any other line."""
    if not line.startswith(_MARK):
        return None
    row: Row = json.loads(line.removeprefix(_MARK))
    return row
