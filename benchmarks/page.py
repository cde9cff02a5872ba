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
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("md", markdown), ("json", text)):
        new = folder / f"{name}.new"
        new.write_text(content)
        new.replace(folder / f"{name}.{suffix}")
