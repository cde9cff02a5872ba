"""(a) What steering costs: steered over unsteered decode speed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from rich.progress import Progress

from benchmarks.core import ARGRE, LINEAS, Bench
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.turns import Edits, Rows, Turns, take_turns
from server.cli.bench_load import Measured
from server.cli.bench_stats import Comparison
from server.cli.bench_tables import throughput_rows
from server.engine.base import Edit

TARGETS = "Targets: LinEAS ≥ 0.98, ARGRE ≥ 0.95, both ≥ 0.93."
_NONE = "none"


def stacks(bench: Bench) -> dict[str, Edits]:
    """What is compared with no steering."""
    lineas, argre = Edit(bench.lineas, LINEAS), Edit(bench.argre, ARGRE)
    gated = Edit(bench.gated, LINEAS)
    sites = len(bench.default_sites)
    return {
        f"LinEAS at {sites} sites": (lineas,),
        f"gated maps at {sites} sites": (gated,),
        f"ARGRE, {ARGRE.iterations} iterations": (argre,),
        "both": (lineas, argre),
    }


def measured(label: str, batch: int, base: Sequence[float], other: Sequence[float]) -> Measured:
    """Seconds a step of two arms in the same rounds, as tokens a second."""
    comparison = Comparison.of(list(zip(base, other, strict=True)))
    before, after = comparison.base_seconds.median, comparison.other_seconds.median
    return Measured(label, batch, batch / before, batch / after, comparison)


def beside_none(
    bench: Bench,
    arms: Mapping[str, Edits],
    batch: int,
    turns: Turns,
    advance: Callable[[], None],
) -> list[Measured]:
    """Batches that are steered alike, in turns with one that is not."""
    rows: dict[str, Rows] = {name: [edits] * batch for name, edits in arms.items()}
    seconds = take_turns(bench, {_NONE: [()] * batch, **rows}, turns, advance)
    return [measured(name, batch, seconds[_NONE], seconds[name]) for name in arms]


def measure_steering(bench: Bench, options: Options, bar: Progress) -> Section:
    """Each stack, and none once more, beside none, at each batch."""
    arms = {"none, once more": (), **stacks(bench)}
    turns = options.turns
    task = bar.add_task("steering", total=len(options.batches) * (turns.rounds + 1))
    outcome = [
        each
        for batch in options.batches
        for each in beside_none(bench, arms, batch, turns, lambda: bar.advance(task))
    ]
    title = f"Decode speed, steered ÷ unsteered. {TARGETS}"
    return Section(
        "steering",
        "What steering costs",
        options.conditions,
        bench.dtype,
        [throughput_rows(title, "unsteered", outcome)],
        {"steering": [asdict(each) for each in outcome]},
    )
