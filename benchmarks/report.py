"""What every benchmark writes: a Markdown page that says where and how it was measured."""

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console


def write_report(
    title: str, module: str, conditions: str, table: Sequence[str], out: Path | None
) -> None:
    """Print a page, and write it to `out` if that is given.

    Args:
        module: the benchmark's, for the command that made the page.
        conditions: what was measured under which load; a sentence.
        table: lines of Markdown.
    """
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    text = "\n".join(
        [
            f"# {title}",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, {processor}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}, transformers {transformers.__version__}, {conditions}",
            "",
            f"`python -m {module} {' '.join(sys.argv[1:])}`",
            "",
            *table,
            "",
        ]
    )
    Console().print(text, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
