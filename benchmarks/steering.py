"""Measures steered ÷ unsteered decode speed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from rich.progress import Progress

from benchmarks.decoding import ITERATIONS, BatchEdits, BenchEngine, Edits
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.turns import Turns, take_turns
from server.measuring.comparison import Throughput
from server.measuring.table import throughput_table

_UNSTEERED = "none"


def steering_trials(engine: BenchEngine) -> dict[str, Edits]:
    """Return the edits that are compared with no steering, by their labels."""
    lineas, argre = engine.lineas(), engine.argre()
    sites = len(engine.sites)
    return {
        f"LinEAS at {sites} sites": (lineas,),
        f"gated maps at {sites} sites": (engine.lineas(gated=True),),
        f"ARGRE, {ITERATIONS} iterations": (argre,),
        "both": (lineas, argre),
    }


def compare_with_unsteered(
    engine: BenchEngine,
    trials: Mapping[str, Edits],
    batch: int,
    turns: Turns,
    advance: Callable[[], None],
) -> list[Throughput]:
    """Measure batches that are steered alike, in turns with an unsteered one."""
    batches: dict[str, BatchEdits] = {name: [edits] * batch for name, edits in trials.items()}
    seconds = take_turns(engine, {_UNSTEERED: [()] * batch, **batches}, turns, advance)
    base = seconds[_UNSTEERED]
    return [Throughput.of(name, batch, batch, base, seconds[name]) for name in trials]


def measure_steering(engine: BenchEngine, options: Options, bar: Progress) -> Section:
    """Compare each steering, and a second unsteered trial, with an unsteered one at each batch."""
    trials = {"none, once more": (), **steering_trials(engine)}
    turns = options.turns
    task = bar.add_task("steering", total=len(options.batches) * (turns.rounds + 1))
    measured = [
        each
        for batch in options.batches
        for each in compare_with_unsteered(engine, trials, batch, turns, lambda: bar.advance(task))
    ]
    title = "Decode speed, steered ÷ unsteered. Targets: LinEAS ≥ 0.98, ARGRE ≥ 0.95, both ≥ 0.93."
    return Section(
        "steering",
        "What steering costs",
        options.conditions,
        engine.dtype,
        [throughput_table(title, "unsteered", measured)],
        {"steering": [asdict(each) for each in measured]},
    )
