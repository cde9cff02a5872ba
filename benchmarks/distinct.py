"""Measures batches of distinct configurations beside batches of equal ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from rich.progress import Progress

from benchmarks.bandwidth import read_bandwidth
from benchmarks.decoding import ETA, ITERATIONS, BatchEdits, BenchEngine
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.turns import take_turns
from server.measuring.comparison import Spread, Throughput
from server.measuring.table import Table, throughput_table
from steering.reward import RewardHead

_UNSTEERED: Final = "none"
_EQUAL: Final = "equal"
_MAPS: Final = "distinct affine maps, distinct strengths"
_STRENGTHS: Final = "one affine map, distinct strengths"
_ETAS: Final = "one reward head, distinct step sizes"
_MILLI: Final = 1000


@dataclass(frozen=True, slots=True)
class HeadsCost:
    """The seconds that some distinct heads in one batch add to each step."""

    heads: int
    batch: int
    over_unsteered: Spread
    over_one_head: Spread
    reading: float  # the heads' bytes ÷ bandwidth

    def cells(self) -> tuple[str, ...]:
        """Return the table's row."""
        return (
            str(self.heads),
            self.over_unsteered.shown(3, _MILLI),
            self.over_one_head.shown(3, _MILLI),
            f"{self.reading * _MILLI:.3f}",
            f"{self.over_unsteered.median / self.reading:.2f}",
            f"{self.over_one_head.median / self.reading:.2f}",
        )


def measure_distinct(engine: BenchEngine, options: Options, bar: Progress) -> Section:
    """Compare distinct maps and settings with equal ones, and measure what distinct heads cost."""
    count = options.distinct
    bandwidth = read_bandwidth(options.device)
    task = bar.add_task("distinct", total=2 * (options.rounds + 1))

    def turns(trials: Mapping[str, BatchEdits]) -> dict[str, list[float]]:
        return take_turns(engine, trials, options.turns, lambda: bar.advance(task))

    maps, heads = turns(_maps(engine, count)), turns(_heads(engine, count, options.head_counts))
    measured = [
        Throughput.of(label, count, count, seconds[_EQUAL], seconds[label])
        for seconds, label in ((maps, _MAPS), (maps, _STRENGTHS), (heads, _ETAS))
    ]
    costs = [
        HeadsCost(
            number,
            count,
            _added(heads[str(number)], heads[_UNSTEERED]),
            _added(heads[str(number)], heads[_EQUAL]),
            number * _stored_bytes(engine.head) / bandwidth,
        )
        for number in options.head_counts
    ]
    title = f"Decode speed of a batch of {count}, distinct ÷ equal. Target: ≥ 0.98."
    return Section(
        "distinct",
        "Distinct configurations in one batch",
        f"{options.conditions} Maps are at the {len(engine.sites)} default sites; every reward "
        f"head takes {ITERATIONS} iterations, and distinct heads have the units of one in other "
        "orders.",
        engine.dtype,
        [throughput_table(title, "equal", measured), _heads_table(costs, count, bandwidth)],
        {
            "distinct": [asdict(each) for each in measured],
            "heads": [asdict(each) for each in costs],
            "bandwidth_bytes_per_second": bandwidth,
        },
    )


def _maps(engine: BenchEngine, count: int) -> dict[str, BatchEdits]:
    """Return a batch of equal affine edits, and two in which all edits are distinct."""
    strengths = [(row + 1) / count for row in range(count)]
    return {
        _EQUAL: [(engine.lineas(),)] * count,
        _MAPS: [(engine.lineas(row, strength),) for row, strength in enumerate(strengths)],
        _STRENGTHS: [(engine.lineas(0, strength),) for strength in strengths],
    }


def _heads(engine: BenchEngine, count: int, numbers: Sequence[int]) -> dict[str, BatchEdits]:
    """Return batches without a head, with one in equal or distinct settings, and with several."""
    return {
        _UNSTEERED: [()] * count,
        _EQUAL: [(engine.argre(),)] * count,
        _ETAS: [(engine.argre(0, ETA * (row + 1) / count),) for row in range(count)],
        **{
            str(number): [(engine.argre(row % number),) for row in range(count)]
            for number in numbers
        },
    }


def _added(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    return Spread.of([other - before for other, before in zip(seconds, base, strict=True)])


def _stored_bytes(head: RewardHead) -> int:
    tensors = (head.w1, head.b1, head.w2, head.b2, head.direction, head.positive_reward)
    return sum(tensor.nbytes for tensor in tensors)


def _heads_table(costs: Sequence[HeadsCost], count: int, bandwidth: float) -> Table:
    return Table(
        f"Distinct reward heads in a batch of {count}: milliseconds a step [quartiles], beside "
        f"reading their stored bytes once at the {bandwidth / 1e9:.1f} GB/s measured in this run. "
        "Target: at most 1.5 times the reading.",
        (
            *("heads", "over unsteered, ms", "over one head, ms", "reading, ms"),
            *("over unsteered ÷ reading", "over one head ÷ reading"),
        ),
        [each.cells() for each in costs],
    )
