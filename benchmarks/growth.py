"""(e) How the cost of steering grows: batch, context, sites, loaded and registered ones."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.progress import Progress

from benchmarks.core import LINEAS, Bench
from benchmarks.options import Options
from benchmarks.random_edits import random_maps
from benchmarks.report import Section
from benchmarks.steering import beside_none, stacks
from benchmarks.turns import Edits
from interventions.bundled import bundled_artifacts
from interventions.registry import Registry
from server.cli.bench_load import Measured
from server.cli.bench_stats import Spread
from server.cli.bench_tables import Rows, throughput_rows
from server.engine.base import Edit

LOOKUPS = 200
MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Point:
    """One thing that is measured beside the same without steering."""

    kind: str
    label: str
    edits: Edits
    batch: int
    context: int


def measure_growth(bench: Bench, options: Options, bar: Progress) -> Section:
    """Steered beside unsteered decode speed, as each quantity grows by itself."""
    task = bar.add_task("growth", total=None)
    outcome: dict[str, list[Measured]] = {}
    for point in _points(bench, options):
        turns = replace(options.turns, prompt_tokens=point.context)
        row = beside_none(
            bench, {point.label: point.edits}, point.batch, turns, lambda: bar.advance(task)
        )
        outcome.setdefault(point.kind, []).extend(row)
    lookups: dict[int, Spread] = {}
    for count in options.registered:
        lookups[count] = _lookup_seconds(count)
        bar.advance(task)
    titles = {
        "batch": "By batch; LinEAS and ARGRE stacked.",
        "context": "By tokens in the prompt; LinEAS and ARGRE stacked.",
        "sites": "By number of sites of an affine map.",
        "loaded": "By number of loaded affine maps, one of which is used.",
    }
    tables = [throughput_rows(titles[kind], "unsteered", rows) for kind, rows in outcome.items()]
    return Section(
        "growth",
        "How the cost of steering grows",
        options.conditions,
        bench.dtype,
        [*tables, _lookup_table(lookups)],
        {
            **{kind: [asdict(row) for row in rows] for kind, rows in outcome.items()},
            "lookup_seconds": {str(count): asdict(each) for count, each in lookups.items()},
        },
    )


def _points(bench: Bench, options: Options) -> Iterator[Point]:
    """In the order in which they are measured, each prepared when it is taken."""
    both = stacks(bench)["both"]
    middle, context = options.batches[len(options.batches) // 2], options.prompt_tokens
    for batch in options.growth_batches:
        yield Point("batch", f"batch {batch}", both, batch, context)
    for tokens in options.contexts:
        yield Point("context", f"{tokens} tokens", both, middle, tokens)
    for label, digest in _maps_by_sites(bench).items():
        yield Point("sites", label, (Edit(digest, LINEAS),), middle, context)
    lineas = (Edit(bench.lineas, LINEAS),)
    for count in options.loaded:
        _load(bench, count)
        yield Point("loaded", f"{count} loaded", lineas, middle, context)


def _maps_by_sites(bench: Bench) -> dict[str, str]:
    """Random maps at one default site, at a quarter, half and all of them: label -> digest."""
    sites = bench.default_sites
    counts = sorted({1, max(1, len(sites) // 4), max(1, len(sites) // 2), len(sites)})
    labels = {}
    for count in counts:
        digest = f"{count} sites"
        bench.parameters[digest] = random_maps(bench.loaded, sites[:count], count)
        labels[f"{count} of {len(sites)} sites"] = digest
    return labels


def _load(bench: Bench, count: int) -> None:
    """Have the engine hold `count` maps, nobody using the others."""
    digests = [bench.lineas, *(f"loaded {seed}" for seed in range(1, count))]
    interventions = bench.core.interventions
    for seed, digest in enumerate(digests):
        if digest not in bench.parameters:
            bench.parameters[digest] = random_maps(bench.loaded, bench.default_sites, seed)
        interventions.pin_or_install(digest, bench.parameters)
        interventions.unpin(digest)


def _lookup_seconds(count: int) -> Spread:
    """What resolving a name takes in a registry of `count` names."""
    path = bundled_artifacts()[0]
    with tempfile.TemporaryDirectory() as folder, Registry(Path(folder)) as registry:
        for number in range(count):
            registry.add(path, f"name-{number}")
        seconds = []
        for number in range(LOOKUPS):
            began = time.perf_counter()
            registry.resolve(f"name-{number % count}")
            seconds.append(time.perf_counter() - began)
    return Spread.of(seconds)


def _lookup_table(lookups: dict[int, Spread]) -> Rows:
    return Rows(
        "By number of registered interventions: what resolving a request's intervention takes. "
        "The engine never sees those that are not loaded.",
        ("registered", "microseconds [quartiles]"),
        tuple((str(count), each.times(MICRO).shown(1)) for count, each in lookups.items()),
    )
