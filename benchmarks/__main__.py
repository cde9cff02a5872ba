"""Everything that steerserve claims about speed, measured side by side on this machine.

python -m benchmarks --vllm-python /path/to/vllm/venv/bin/python
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.core import Bench, BenchmarkError, open_bench
from benchmarks.distinct import measure_distinct
from benchmarks.engines import measure_engines
from benchmarks.growth import measure_growth
from benchmarks.latency import measure_latency
from benchmarks.options import Options
from benchmarks.report import write_section
from benchmarks.steering import measure_steering

IN_PROCESS = {
    "steering": measure_steering,
    "distinct": measure_distinct,
    "growth": measure_growth,
}
SECTIONS = ("steering", "distinct", "engines", "latency", "growth")
RESULTS = Path(__file__).parent / "results"


def main(
    only: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(SECTIONS),
    rounds: Annotated[
        int, typer.Option(min=1, help="Values of each arm; a third as many of what takes long.")
    ] = 15,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = RESULTS,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="The python of an environment with vLLM; not run if unset.", exists=True),
    ] = None,
    model: Annotated[str, typer.Option(help="embedded, or a folder.")] = "embedded",
    device: Annotated[str, typer.Option(help="cpu, or cuda: of what runs in process.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run of a few tokens.")] = False,
) -> None:
    """Measure what steering costs, and this engine beside others."""
    # As an exception, which ends the engines' processes on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    chosen = only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise typer.BadParameter(f"--only knows {', '.join(SECTIONS)}, not {unknown[0]!r}")
    options = (
        Options.quick(model, device, vllm_python)
        if quick
        else Options(model, device, rounds, vllm_python)
    )
    try:
        _measure(chosen, options, out)
    except BenchmarkError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _measure(chosen: list[str], options: Options, out: Path) -> None:
    """Each section is written as soon as it is there."""
    # What runs in other processes comes first, while this one holds no model.
    if "engines" in chosen:
        with _progress() as bar:
            section = measure_engines(options, bar)
        write_section(section, out)
    if "latency" in chosen:
        write_section(measure_latency(options), out)
    bench: Bench | None = None
    for name in (name for name in IN_PROCESS if name in chosen):
        if bench is None:
            bench = open_bench(options.model, options.device)
        with _progress() as bar:
            section = IN_PROCESS[name](bench, options, bar)
        write_section(section, out)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


if __name__ == "__main__":
    typer.run(main)
