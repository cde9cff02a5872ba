"""Measures everything that steerserve claims about speed, side by side on this machine.

python -m benchmarks --vllm-python "$(constraints/vllm_environment.sh)/bin/python"
"""

import importlib
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import Progress

from benchmarks.decoding import BenchEngine, BenchmarkError
from benchmarks.distinct import measure_distinct
from benchmarks.engines import measure_engines
from benchmarks.growth import measure_growth
from benchmarks.latency import measure_latency
from benchmarks.models import open_engine
from benchmarks.options import Options
from benchmarks.report import Section, write_section
from benchmarks.steering import measure_steering
from server.cli.bench.client import BenchError
from server.cli.progress import progress
from server.engine.vllm.environment import prepare_environment

_IN_PROCESS: Final[Mapping[str, Callable[[BenchEngine, Options, Progress], Section]]] = {
    "steering": measure_steering,
    "distinct": measure_distinct,
    "growth": measure_growth,
}
SECTIONS: Final = ("steering", "distinct", "engines", "latency", "growth")
_INSIDE_VLLM: Final = "vllm"  # runs where vLLM is installed, and only if it is asked for
_RESULTS: Final = Path(__file__).parent / "results"


def main(
    only: Annotated[str, typer.Option(help="Sections to run, separated by commas.")] = ",".join(
        SECTIONS
    ),
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds; a third as many for engines and latency.")
    ] = 15,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = _RESULTS,
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of an environment with vLLM; if unset, vLLM is not run.", exists=True
        ),
    ] = None,
    model: Annotated[str, typer.Option(help='"embedded", or a folder.')] = "embedded",
    device: Annotated[
        str, typer.Option(help="cpu or cuda, for the sections that run in this process.")
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run of a few tokens.")] = False,
) -> None:
    """Measure what steering costs, and this engine beside others."""
    # An exception ends the processes of the engines on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    chosen = only.split(",")
    known = (*SECTIONS, _INSIDE_VLLM)
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"--only knows {', '.join(known)}, not {unknown[0]!r}")
    if quick:
        options = Options.quick(model, device, vllm_python)
    else:
        options = Options(model, device, rounds, vllm_python)
    try:
        _measure(chosen, options, out)
    except (BenchmarkError, BenchError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _measure(chosen: list[str], options: Options, out: Path) -> None:
    """Write each section as soon as it is measured."""
    # Other processes are measured first, while this one holds no model.
    if "engines" in chosen:
        with progress() as bar:
            section = measure_engines(options, bar)
        write_section(section, out)
    if _INSIDE_VLLM in chosen:
        prepare_environment()
        inside_vllm = importlib.import_module("benchmarks.inside_vllm")
        with progress() as bar:
            section = inside_vllm.measure_vllm(options, bar)
        write_section(section, out)
    if "latency" in chosen:
        write_section(measure_latency(options), out)
    measures = {name: measure for name, measure in _IN_PROCESS.items() if name in chosen}
    if measures:
        engine = open_engine(options.model, options.device)
        for measure in measures.values():
            with progress() as bar:
                section = measure(engine, options, bar)
            write_section(section, out)


if __name__ == "__main__":
    typer.run(main)
