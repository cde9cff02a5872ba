"""(a) What steering costs: steered over unsteered decode speed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from rich.progress import Progress

from benchmarks.core import ARGRE, LINEAS, Bench, Edits
from benchmarks.options import Options
from benchmarks.report import Section
from server.cli.bench_load import Measured
from server.cli.bench_stats import Comparison, Pair
from server.cli.bench_tables import throughput_rows
from server.engine.base import Edit

TARGETS = "Targets: LinEAS ≥ 0.98, ARGRE ≥ 0.95, both ≥ 0.93."


def stacks(bench: Bench) -> dict[str, Edits]:
    """What is compared with no steering."""
    lineas, argre = Edit(bench.lineas, LINEAS), Edit(bench.argre, ARGRE)
    sites = len(bench.default_sites)
    return {
        f"LinEAS at {sites} sites": (lineas,),
        f"ARGRE, {ARGRE.iterations} iterations": (argre,),
        "both": (lineas, argre),
    }


def measured(label: str, batch: int, pairs: list[Pair]) -> Measured:
    """Pairs of seconds a step, as tokens a second."""
    comparison = Comparison.of(pairs)
    base, other = comparison.base_seconds.median, comparison.other_seconds.median
    return Measured(label, batch, batch / base, batch / other, comparison)


def pairs_with_none(
    bench: Bench,
    arms: Mapping[str, Edits],
    batch: int,
    options: Options,
    advance: Callable[[], None],
) -> dict[str, list[Pair]]:
    """Each arm's bursts beside unsteered ones; `advance` is called after each round."""
    pairs: dict[str, list[Pair]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        for name, edits in arms.items():
            pair = bench.pair(
                [()] * batch,
                [edits] * batch,
                options.prompt_tokens,
                options.burst_steps,
                number,
            )
            if number:  # the first round warms up
                pairs[name].append(pair)
        advance()
    return pairs


def measure_steering(bench: Bench, options: Options, bar: Progress) -> Section:
    """Each stack in pairs of bursts with none, at each batch."""
    arms = stacks(bench)
    task = bar.add_task("steering", total=len(options.batches) * (options.rounds + 1))
    outcome = []
    for batch in options.batches:
        pairs = pairs_with_none(bench, arms, batch, options, lambda: bar.advance(task))
        outcome += [measured(name, batch, seconds) for name, seconds in pairs.items()]
    title = f"Decode speed, steered ÷ unsteered. {TARGETS}"
    return Section(
        "steering",
        "What steering costs",
        options.burst_conditions,
        bench.dtype,
        [throughput_rows(title, "unsteered", outcome)],
        {"steering": [asdict(each) for each in outcome]},
    )
