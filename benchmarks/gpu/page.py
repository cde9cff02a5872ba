"""A check's page: Markdown and JSON that grow with each row, so that nothing is lost."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Outcome, Part
from benchmarks.gpu.rows import Row


class Page:
    """`gpu.md` and `gpu.json` in a folder."""

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._markdown = folder / "gpu.md"
        self._json = folder / "gpu.json"
        began = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        self._data: dict[str, Any] = {"date": began, "command": command, "parts": []}
        self._columns: list[str] = []
        self._markdown.write_text(f"# A check of the GPU\n\n{began}, `{command}`\n")

    def begin(self, part: Part) -> None:
        """Begin a part."""
        self._data["parts"].append({"name": part.name, "rows": []})
        self._columns = []
        self._append(f"\n## {part.title}\n")

    def row(self, row: Row) -> None:
        """Add a row; one with other columns begins a table of its own."""
        self._data["parts"][-1]["rows"].append(dict(row))
        if list(row) != self._columns:
            self._columns = list(row)
            self._append(f"\n{_line(self._columns)}\n{_line(['---'] * len(self._columns))}\n")
        self._append(f"{_line(['' if each is None else str(each) for each in row.values()])}\n")

    def end(self, outcome: Outcome, seconds: float) -> None:
        """End a part."""
        self._data["parts"][-1] |= {
            "passed": outcome.passed,
            "how": outcome.how,
            "seconds": round(seconds, 1),
            "tail": outcome.tail,
        }
        tail = f"\n```\n{outcome.tail}\n```\n" if outcome.tail else ""
        self._append(f"\n{outcome.how.capitalize()}, {seconds:.1f} s.\n{tail}")

    def close(self, sentence: str) -> None:
        """Add the last line."""
        self._data["outcome"] = sentence
        self._append(f"\n{sentence}\n")

    def _append(self, text: str) -> None:
        with self._markdown.open("a") as page:
            page.write(text)
        # Whole at any time, whenever this is ended.
        new = self._json.with_suffix(".new")
        new.write_text(json.dumps(self._data, indent=1) + "\n")
        new.replace(self._json)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(each.replace('|', '/').replace(chr(10), ' ') for each in cells)} |"
