"""(b) Whether distinct configurations in one batch cost more than equal ones."""

from dataclasses import asdict, dataclass

from rich.progress import Progress

from benchmarks.bandwidth import read_bandwidth
from benchmarks.core import ARGRE, LINEAS, Bench, Rows, head_bytes, random_head, random_maps
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.steering import measured
from server.cli.bench_stats import Spread
from server.cli.bench_tables import MILLI, throughput_rows
from server.cli.bench_tables import Rows as TableRows
from server.engine.base import Edit
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings


@dataclass(frozen=True, slots=True)
class HeadsMeasured:
    """What some distinct heads in one batch cost in each step; seconds."""

    heads: int
    batch: int
    over_unsteered: Spread
    over_one_head: Spread
    reading: float  # the heads' bytes ÷ bandwidth

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        return (
            str(self.heads),
            self.over_unsteered.times(MILLI).shown(3),
            self.over_one_head.times(MILLI).shown(3),
            f"{self.reading * MILLI:.3f}",
            f"{self.over_unsteered.median / self.reading:.2f}",
            f"{self.over_one_head.median / self.reading:.2f}",
        )


def measure_distinct(bench: Bench, options: Options, bar: Progress) -> Section:
    """Distinct maps and settings over equal ones, and what distinct heads cost."""
    count = options.distinct
    bandwidth = read_bandwidth(options.device)
    arms = _equal_and_distinct(bench, count)
    task = bar.add_task("distinct", total=len(arms) + len(options.head_counts))
    outcome = []
    for label, (equal, distinct) in arms.items():
        pairs = _pairs(bench, options, equal, distinct)
        outcome.append(measured(label, count, pairs))
        bar.advance(task)
    heads = []
    for number in options.head_counts:
        heads.append(_heads(bench, options, number, bandwidth))
        bar.advance(task)
    title = f"Decode speed of a batch of {count}, distinct ÷ equal. Target: ≥ 0.98."
    return Section(
        "distinct",
        "Distinct configurations in one batch",
        f"{options.burst_conditions} Maps are at the "
        f"{len(bench.default_sites)} default sites; every reward head takes {ARGRE.iterations} "
        "iterations.",
        bench.dtype,
        [throughput_rows(title, "equal", outcome), _head_table(heads, count, bandwidth)],
        {
            "distinct": [asdict(each) for each in outcome],
            "heads": [asdict(each) for each in heads],
            "bandwidth_bytes_per_second": bandwidth,
        },
    )


def _pairs(bench: Bench, options: Options, base: Rows, other: Rows) -> list[tuple[float, float]]:
    pairs = [
        bench.pair(base, other, options.prompt_tokens, options.burst_steps, number)
        for number in range(options.rounds + 1)
    ]
    return pairs[1:]  # the first warms up


def _equal_and_distinct(bench: Bench, count: int) -> dict[str, tuple[Rows, Rows]]:
    """By label: a batch of equal requests, and one in which no two are."""
    # The first is the real one, so that equal requests use what everybody uses.
    maps = [bench.lineas, *(f"map {seed}" for seed in range(1, count))]
    for seed, digest in enumerate(maps[1:], 1):
        bench.parameters[digest] = random_maps(bench.loaded, bench.default_sites, seed)
    strengths = [AffineSettings((place + 1) / count) for place in range(count)]
    etas = [
        RewardSettings(ARGRE.eta * (place + 1) / count, ARGRE.iterations) for place in range(count)
    ]
    equal_maps: Rows = [(Edit(bench.lineas, LINEAS),)] * count
    equal_heads: Rows = [(Edit(bench.argre, ARGRE),)] * count
    return {
        f"{count} affine maps, {count} strengths": (
            equal_maps,
            [(Edit(digest, each),) for digest, each in zip(maps, strengths, strict=True)],
        ),
        f"one affine map, {count} strengths": (
            equal_maps,
            [(Edit(bench.lineas, each),) for each in strengths],
        ),
        f"one reward head, {count} step sizes": (
            equal_heads,
            [(Edit(bench.argre, each),) for each in etas],
        ),
    }


def _heads(bench: Bench, options: Options, number: int, bandwidth: float) -> HeadsMeasured:
    """A batch that uses `number` distinct heads, beside one without and one with a single head."""
    digests = [bench.argre, *(f"head {seed}" for seed in range(1, number))]
    for seed, digest in enumerate(digests[1:], 1):
        bench.parameters[digest] = random_head(bench.loaded, seed)
    count = options.distinct
    rows: Rows = [(Edit(digests[row % number], ARGRE),) for row in range(count)]
    one: Rows = [(Edit(bench.argre, ARGRE),)] * count
    plain = _pairs(bench, options, [()] * count, rows)
    single = _pairs(bench, options, one, rows)
    stored = sum(
        head_bytes(head)
        for digest in digests
        if isinstance(head := bench.parameters[digest], RewardHead)
    )
    return HeadsMeasured(
        number,
        count,
        Spread.of([other - base for base, other in plain]),
        Spread.of([other - base for base, other in single]),
        stored / bandwidth,
    )


def _head_table(heads: list[HeadsMeasured], count: int, bandwidth: float) -> TableRows:
    return TableRows(
        f"Distinct reward heads in a batch of {count}: milliseconds a step [quartiles], beside "
        f"reading their stored bytes once at the {bandwidth / 1e9:.1f} GB/s measured in this run. "
        "Target: at most 1.5 times the reading.",
        (
            *("heads", "over unsteered, ms", "over one head, ms", "reading, ms"),
            *("over unsteered ÷ reading", "over one head ÷ reading"),
        ),
        tuple(each.cells() for each in heads),
    )
