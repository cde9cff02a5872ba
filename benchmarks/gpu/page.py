"""The page of a check: Markdown and JSON that are written again with each row."""

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.page import command, date, write_page
from server.measuring.table import Table

Value: TypeAlias = str | int | float | bool | None


class Page:
    """`gpu.md` and `gpu.json` in a folder, whole after each call.

    The check writes the page between its parts, and each part adds its rows from its own process.
    """

    def __init__(self, folder: Path) -> None:
        self.failures = 0  # of this process
        self._folder = folder

    def start(self) -> None:
        """Write a page without parts."""
        self._write({"date": date(), "command": command(), "parts": []})

    def begin(self, name: str, title: str) -> None:
        """Begin a part."""
        data = self._read()
        data["parts"].append({"name": name, "title": title, "rows": []})
        self._write(data)

    def tell(self, **row: Value) -> None:
        """Add a row to the last part."""
        data = self._read()
        data["parts"][-1]["rows"].append(row)
        self._write(data)

    @contextmanager
    def attempt(self, **row: Value) -> Iterator[None]:
        """Tell an exception of the block as a row, and go on after the block."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            traceback.print_exc()
            self.tell(**row, failed=f"{type(error).__name__}: {error}".strip().splitlines()[0])

    def end(self, **outcome: Value) -> None:
        """End the last part, with the fields of an `Outcome` and its `seconds`."""
        data = self._read()
        data["parts"][-1] |= outcome
        self._write(data)

    def close(self, sentence: str) -> None:
        """Add the last line."""
        self._write({**self._read(), "outcome": sentence})

    def _read(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self._folder / "gpu.json").read_text())
        return data

    def _write(self, data: Mapping[str, Any]) -> None:
        blocks = [
            f"# A check of the GPU\n\n{data['date']}, `{data['command']}`",
            *(block for part in data["parts"] for block in _blocks(part)),
            data.get("outcome", ""),
        ]
        write_page(self._folder, "gpu", "\n\n".join(filter(None, blocks)) + "\n", data)


def _blocks(part: Mapping[str, Any]) -> list[str]:
    """Return a part's paragraphs; neighboring rows with equal columns share a table."""
    blocks = [f"## {part['title']}"]
    for columns, rows in groupby(part["rows"], key=tuple):
        cells = [["" if each is None else str(each) for each in row.values()] for row in rows]
        blocks.append(Table("", columns, cells).markdown())
    if "how" in part:
        blocks.append(f"{part['how'].capitalize()}, {part['seconds']} s.")
    if part.get("tail"):
        blocks.append(f"```\n{part['tail']}\n```")
    return blocks
