"""(b) Whether distinct configurations in one batch cost more than equal ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from rich.progress import Progress

from benchmarks.bandwidth import read_bandwidth
from benchmarks.core import ARGRE, LINEAS, Bench, head_bytes
from benchmarks.options import Options
from benchmarks.random_edits import permuted_head, random_maps
from benchmarks.report import Section
from benchmarks.steering import measured
from benchmarks.turns import Rows, take_turns
from server.cli.bench_stats import Spread
from server.cli.bench_tables import MILLI, throughput_rows
from server.cli.bench_tables import Rows as TableRows
from server.engine.base import Edit
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings

_NONE: Final = "none"
_EQUAL: Final = "equal"
_MAPS: Final = "distinct affine maps, distinct strengths"
_STRENGTHS: Final = "one affine map, distinct strengths"
_ETAS: Final = "one reward head, distinct step sizes"


@dataclass(frozen=True, slots=True)
class HeadsCost:
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
    task = bar.add_task("distinct", total=2 * (options.rounds + 1))

    def turns(arms: Mapping[str, Rows]) -> dict[str, list[float]]:
        return take_turns(bench, arms, options.turns, lambda: bar.advance(task))

    maps, heads = turns(_maps(bench, count)), turns(_heads(bench, count, options.head_counts))
    outcome = [
        measured(label, count, seconds[_EQUAL], seconds[label])
        for seconds, label in ((maps, _MAPS), (maps, _STRENGTHS), (heads, _ETAS))
    ]
    costs = [_cost(bench, number, count, heads, bandwidth) for number in options.head_counts]
    title = f"Decode speed of a batch of {count}, distinct ÷ equal. Target: ≥ 0.98."
    return Section(
        "distinct",
        "Distinct configurations in one batch",
        f"{options.conditions} Maps are at the {len(bench.default_sites)} default sites; every "
        f"reward head takes {ARGRE.iterations} iterations, and distinct heads have the units of "
        "one in other orders.",
        bench.dtype,
        [throughput_rows(title, "equal", outcome), _head_table(costs, count, bandwidth)],
        {
            "distinct": [asdict(each) for each in outcome],
            "heads": [asdict(each) for each in costs],
            "bandwidth_bytes_per_second": bandwidth,
        },
    )


def _maps(bench: Bench, count: int) -> dict[str, Rows]:
    """A batch of equal affine edits, and two in which none is like another."""
    # The first is the real one, so that equal requests use what everybody uses.
    digests = [bench.lineas, *(f"map {seed}" for seed in range(1, count))]
    for seed, digest in enumerate(digests[1:], 1):
        bench.parameters[digest] = random_maps(bench.loaded, bench.default_sites, seed)
    strengths = [AffineSettings((place + 1) / count) for place in range(count)]
    return {
        _EQUAL: [(Edit(bench.lineas, LINEAS),)] * count,
        _MAPS: [(Edit(digest, each),) for digest, each in zip(digests, strengths, strict=True)],
        _STRENGTHS: [(Edit(bench.lineas, each),) for each in strengths],
    }


def _heads(bench: Bench, count: int, numbers: Sequence[int]) -> dict[str, Rows]:
    """Batches without a head, with one in equal settings or in distinct ones, and with several."""
    etas = [
        RewardSettings(ARGRE.eta * (place + 1) / count, ARGRE.iterations) for place in range(count)
    ]
    arms: dict[str, Rows] = {
        _NONE: [()] * count,
        _EQUAL: [(Edit(bench.argre, ARGRE),)] * count,
        _ETAS: [(Edit(bench.argre, each),) for each in etas],
    }
    head = bench.parameters[bench.argre]
    assert isinstance(head, RewardHead), "not a reward intervention"
    for number in numbers:
        digests = _head_digests(bench, number)
        for seed, digest in enumerate(digests[1:], 1):
            bench.parameters[digest] = permuted_head(head, seed)
        arms[str(number)] = [(Edit(digests[row % number], ARGRE),) for row in range(count)]
    return arms


def _head_digests(bench: Bench, number: int) -> list[str]:
    return [bench.argre, *(f"head {seed}" for seed in range(1, number))]


def _cost(
    bench: Bench, number: int, batch: int, seconds: Mapping[str, Sequence[float]], bandwidth: float
) -> HeadsCost:
    """What `number` heads took more than none, and than one."""
    stored = sum(
        head_bytes(head)
        for digest in _head_digests(bench, number)
        if isinstance(head := bench.parameters[digest], RewardHead)
    )
    return HeadsCost(
        number,
        batch,
        _more(seconds[str(number)], seconds[_NONE]),
        _more(seconds[str(number)], seconds[_EQUAL]),
        stored / bandwidth,
    )


def _more(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    return Spread.of([other - before for other, before in zip(seconds, base, strict=True)])


def _head_table(heads: list[HeadsCost], count: int, bandwidth: float) -> TableRows:
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
