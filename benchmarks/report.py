"""What every benchmark writes: Markdown and JSON that say where and how it was measured."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from pydantic import JsonValue
from rich.console import Console

from server.cli.bench_tables import Rows


@dataclass(frozen=True, slots=True)
class Section:
    """The outcome of one benchmark.

    `conditions` says in a sentence what was measured under which load, `tables` carry their
    meaning as titles, `data` is everything that the tables are made of.
    """

    name: str
    title: str
    conditions: str
    dtype: str
    tables: Sequence[Rows]
    data: Mapping[str, JsonValue]
    versions: Mapping[str, str] = field(default_factory=dict)  # of what ran in other processes


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the versions of one run."""

    date: str
    command: str
    machine: str
    cores: int
    threads: int
    dtype: str
    versions: Mapping[str, str]

    def sentence(self) -> str:
        """For the head of a page."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.date}, {self.machine}, {self.cores} cores, {self.threads} threads, "
            f"{self.dtype}, {versions}"
        )

    def body(self) -> dict[str, JsonValue]:
        """For JSON."""
        return {
            "date": self.date,
            "command": self.command,
            "machine": self.machine,
            "cores": self.cores,
            "threads": self.threads,
            "dtype": self.dtype,
            "versions": dict(self.versions),
        }


def environment(module: str, dtype: str, versions: Mapping[str, str]) -> Environment:
    """This machine, and the versions of this process and of `versions`.

    Args:
        module: what was run, for the command.
    """
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Environment(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
        machine=", ".join([str(processor), *devices]),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        dtype=dtype,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **versions,
        },
    )


def write_section(section: Section, folder: Path) -> None:
    """Print a section as Markdown, and write `<name>.md` and `<name>.json` into the folder."""
    where = environment("benchmarks", section.dtype, section.versions)
    folder.mkdir(parents=True, exist_ok=True)
    text = _page(section, where)
    (folder / f"{section.name}.md").write_text(text)
    body = {"section": section.name, "conditions": section.conditions, **where.body()}
    content = json.dumps({**body, **section.data}, indent=1, ensure_ascii=False)
    (folder / f"{section.name}.json").write_text(content + "\n")
    Console().print(text, markup=False, soft_wrap=True)


def _page(section: Section, where: Environment) -> str:
    lines = [f"# {section.title}", "", where.sentence() + ".", ""]
    lines += [f"`{where.command}`", "", section.conditions, ""]
    for rows in section.tables:
        lines += [rows.title, "", *rows.markdown(), ""]
    return "\n".join(lines)


def write_report(
    title: str, module: str, conditions: str, table: Sequence[str], out: Path | None
) -> None:
    """Print a page, and write it to `out` if that is given.

    Args:
        module: the benchmark's, for the command that made the page.
        conditions: what was measured under which load, and in which dtype; a sentence.
        table: lines of Markdown.
    """
    where = environment(module, "", {})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = f"{where.date}, {where.machine}, {where.threads} threads, {versions}, {conditions}"
    text = "\n".join([f"# {title}", "", head, "", f"`{where.command}`", "", *table, ""])
    Console().print(text, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
