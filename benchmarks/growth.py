"""Measures how the cost of steering grows with batch, context, sites, loaded and stored maps."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, TypeAlias

from rich.progress import Progress

from benchmarks.decoding import BenchEngine, Edits
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.steering import compare_with_unsteered
from interventions.bundled import bundled_artifacts
from interventions.registry import Registry
from server.measuring.comparison import Spread, Throughput
from server.measuring.table import Table, throughput_table

Point: TypeAlias = tuple[str, str, Edits, int, int]
"""A key of `_TITLES`, a label, the edits of a batch, its size, and the tokens of each prompt."""

_LOOKUPS: Final = 200
_MICRO: Final = 1e6
_TITLES: Final = {
    "batch": "By batch; LinEAS and ARGRE stacked.",
    "context": "By tokens in the prompt; LinEAS and ARGRE stacked.",
    "sites": "By number of sites of an affine map.",
    "loaded": "By number of loaded affine maps, one of which is used.",
}


def measure_growth(engine: BenchEngine, options: Options, bar: Progress) -> Section:
    """Compare steered with unsteered decode speed, as each quantity grows by itself."""
    task = bar.add_task("growth", total=None)
    measured: defaultdict[str, list[Throughput]] = defaultdict(list)
    for kind, label, edits, batch, context in _points(engine, options):
        turns = replace(options.turns, prompt_tokens=context)
        measured[kind] += compare_with_unsteered(
            engine, {label: edits}, batch, turns, lambda: bar.advance(task)
        )
    lookups = {count: _lookup_seconds(count) for count in options.registered}
    lookup_table = Table(
        "By number of registered interventions: what resolving a request's intervention takes. "
        "The engine never sees those that are not loaded.",
        ("registered", "microseconds [quartiles]"),
        [(str(count), each.shown(1, _MICRO)) for count, each in lookups.items()],
    )
    tables = [throughput_table(_TITLES[kind], "unsteered", rows) for kind, rows in measured.items()]
    return Section(
        "growth",
        "How the cost of steering grows",
        options.conditions,
        engine.dtype,
        [*tables, lookup_table],
        {
            **{kind: [asdict(row) for row in rows] for kind, rows in measured.items()},
            "lookup_seconds": {str(count): asdict(each) for count, each in lookups.items()},
        },
    )


def _points(engine: BenchEngine, options: Options) -> Iterator[Point]:
    """Yield the points in the order in which they are measured, each prepared when it is taken."""
    lineas, both = engine.lineas(), (engine.lineas(), engine.argre())
    middle, context = options.batches[len(options.batches) // 2], options.prompt_tokens
    for batch in options.growth_batches:
        yield "batch", f"batch {batch}", both, batch, context
    for tokens in options.contexts:
        yield "context", f"{tokens} tokens", both, middle, tokens
    total = len(engine.sites)
    for sites in sorted({1, max(1, total // 4), max(1, total // 2), total}):
        label = f"{sites} of {total} sites"
        yield "sites", label, (engine.lineas(sites=sites),), middle, context
    for count in options.loaded:
        _load(engine, count)
        yield "loaded", f"{count} loaded", (lineas,), middle, context


def _load(engine: BenchEngine, count: int) -> None:
    """Have the engine load `count` maps."""
    for number in range(count):
        digest = engine.lineas(number).digest
        engine.core.interventions.pin_or_install(digest, engine.parameters)
        engine.core.interventions.slots.unpin(digest)


def _lookup_seconds(count: int) -> Spread:
    """Measure what resolving a name takes in a registry of `count` names."""
    path = bundled_artifacts()[0]
    with tempfile.TemporaryDirectory() as folder, Registry(Path(folder)) as registry:
        for number in range(count):
            registry.add(path, f"name-{number}")
        seconds = []
        for number in range(_LOOKUPS):
            began = time.perf_counter()
            registry.resolve(f"name-{number % count}")
            seconds.append(time.perf_counter() - began)
    return Spread.of(seconds)
