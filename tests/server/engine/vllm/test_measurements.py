"""What the workers measured, on its way to the requests' outputs."""

import asyncio
from typing import Any

from server.engine.output import EngineStats, StepOutput
from server.engine.vllm.measurements import Measurements
from server.engine.vllm.plugin.wire import Measured
from steering.dose import DoseTotal

PERIOD = 0.01
STATS = EngineStats(1, 0, 0.5, 1)


class Workers:
    """Two ranks of a pipeline."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.measured: list[list[Measured]] = []  # by reading, one of each rank
        self.is_dead = False
        self.read = asyncio.Semaphore(0)  # released by each reading

    async def call(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, arguments))
        if method == "steering_measurements":
            self.read.release()
        if self.is_dead:
            raise ConnectionError("they are gone")
        if method == "steering_measurements" and self.measured:
            return [each.to_message() for each in self.measured.pop(0)]
        return [Measured().to_message()] * 2

    @property
    def readings(self) -> int:
        return sum(method == "steering_measurements" for method, _ in self.calls)


def output(measurements: Measurements, name: str) -> StepOutput:
    return measurements.with_doses(name, StepOutput((1,), "x"))


async def until_read(workers: Workers, readings: int) -> None:
    """Wait for so many more readings."""
    async with asyncio.timeout(30):
        for _ in range(readings):
            await workers.read.acquire()
    await asyncio.sleep(PERIOD / 4)


async def test_the_next_output_tells_the_mean_over_the_ranks_once() -> None:
    workers = Workers()
    workers.measured.append(
        [
            Measured(0.5, 0.125, {"a": (DoseTotal(1, 4), DoseTotal(0, 0))}),
            Measured(0.5, 0.125, {"a": (DoseTotal(2, 4), DoseTotal(0, 0)), "ended": ()}),
        ]
    )
    measurements = Measurements(workers.call, 16, PERIOD)
    await measurements.start()
    assert workers.calls == [("steering_measure", (16,))]
    with measurements.of_request("a", is_steered=True):
        assert output(measurements, "a").doses == ()
        await until_read(workers, 2)
        assert output(measurements, "b").doses == ()
        assert output(measurements, "a").doses == (3 / 8, None)
        assert output(measurements, "a").doses == ()
    stats = measurements.with_times(STATS)
    assert (stats.measured_step_seconds, stats.measured_edit_seconds) == (1.0, 0.25)
    await measurements.close()


async def test_only_steered_requests_have_the_workers_asked() -> None:
    workers = Workers()
    measurements = Measurements(workers.call, 16, PERIOD)
    with measurements.of_request("plain", is_steered=False):
        await asyncio.sleep(5 * PERIOD)
    assert workers.readings == 0
    for _ in range(2):
        with measurements.of_request("steered", is_steered=True):
            await until_read(workers, 2)
        await asyncio.sleep(5 * PERIOD)
        before = workers.readings
        await asyncio.sleep(5 * PERIOD)
        assert workers.readings == before
    await measurements.close()


async def test_nothing_is_measured_if_it_is_not_wanted() -> None:
    workers = Workers()
    measurements = Measurements(workers.call, 0, PERIOD)
    await measurements.start()
    with measurements.of_request("steered", is_steered=True):
        await asyncio.sleep(5 * PERIOD)
    assert workers.calls == [("steering_measure", (0,))]
    await measurements.close()


async def test_workers_that_died_are_left_to_the_requests() -> None:
    workers = Workers()
    measurements = Measurements(workers.call, 1, PERIOD)
    with measurements.of_request("steered", is_steered=True):
        workers.is_dead = True
        await until_read(workers, 1)
        assert output(measurements, "steered").doses == ()
        await asyncio.sleep(5 * PERIOD)
        assert workers.readings == 1
    await measurements.close()


async def test_doses_that_come_after_the_end_are_dropped() -> None:
    workers = Workers()
    measurements = Measurements(workers.call, 1, PERIOD)
    workers.measured.append([Measured(doses={"a": (DoseTotal(1, 1),)})] * 2)
    with measurements.of_request("a", is_steered=True):
        pass
    await until_read(workers, 1)
    assert output(measurements, "a").doses == ()
    await measurements.close()
