"""The outcome of a benchmark, with where and how it was measured."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from benchmarks.page import command, date, write_page
from server.measuring.table import Table


@dataclass(frozen=True, slots=True)
class Section:
    """The outcome of one benchmark."""

    name: str
    title: str
    conditions: str  # what was measured under which load, in a sentence
    dtype: str
    tables: Sequence[Table]
    data: Mapping[str, object]  # all figures that the tables are made of, for JSON
    versions: Mapping[str, str] = field(default_factory=dict)  # of what ran in other processes


def write_section(section: Section, folder: Path | None) -> None:
    """Print a section as Markdown, and write `<name>.md` and `<name>.json` into the folder."""
    text, body = rendered(section)
    print(text)
    if folder is not None:
        write_page(folder, section.name, text, body)


def rendered(section: Section) -> tuple[str, Mapping[str, object]]:
    """Return a section as Markdown and as data, both with the machine that it was measured on."""
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = ", ".join([str(processor), *devices])
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **section.versions,
    }
    head = (
        f"{date()}, {machine}, {cores} cores, {threads} threads, {section.dtype}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    tables = "\n".join(table.page() for table in section.tables)
    text = f"# {section.title}\n\n{head}\n\n`{command()}`\n\n{section.conditions}\n\n{tables}"
    body = {
        "section": section.name,
        "conditions": section.conditions,
        "date": date(),
        "command": command(),
        "machine": machine,
        "cores": cores,
        "threads": threads,
        "dtype": section.dtype,
        "versions": versions,
        **section.data,
    }
    return text, body
