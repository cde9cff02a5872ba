"""The pages of results: Markdown for people beside JSON with all figures."""

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path


def date() -> str:
    """Return the time for the head of a page."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def command() -> str:
    """Return the command that runs this process."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_page(folder: Path, name: str, markdown: str, data: Mapping[str, object]) -> None:
    """Write `<name>.md` and `<name>.json` into a folder. Each is whole, whenever this is ended."""
    write_whole(folder / f"{name}.md", markdown.encode())
    write_whole(folder / f"{name}.json", json_text(data).encode())


def json_text(data: Mapping[str, object]) -> str:
    """Return figures as the text of a JSON file."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder if it is missing. It is whole, whenever this is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
