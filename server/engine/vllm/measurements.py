"""Reads now and then what vLLM's workers have measured of their edits."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

from server.engine.output import EngineStats, StepOutput
from server.engine.vllm.plugin.wire import Measured

_PERIOD: Final = 1.0  # seconds between two readings, while steered requests run

logger = logging.getLogger(__name__)


class Measurements:
    """Holds the times of measured steps, and the doses that no output has told yet."""

    def __init__(
        self,
        call: Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]],
        interval: int,
        period: float = _PERIOD,
    ) -> None:
        """Measure nothing yet.

        Args:
            call: calls a method of every worker.
            interval: steered steps for each that is measured; 0: none is.
            period: seconds between two readings.
        """
        self._call = call
        self._interval = interval
        self._period = period
        self._sums = Measured()
        self._doses: dict[str, tuple[float | None, ...]] = {}
        self._steered: set[str] = set()  # the steered requests that run
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Have the workers measure, from the next steered step on."""
        await self._call("steering_measure", (self._interval,))

    @contextmanager
    def of_request(self, name: str, *, is_steered: bool) -> Iterator[None]:
        """Read measurements as long as a steered request runs, which the context is for."""
        if not (self._interval and is_steered):
            yield
            return
        self._steered.add(name)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_while_steered())
        try:
            yield
        finally:
            self._steered.discard(name)
            self._doses.pop(name, None)

    def with_doses(self, name: str, output: StepOutput) -> StepOutput:
        """Return a request's output with the doses that none has told, if there are any."""
        doses = self._doses.pop(name, None)
        return output if doses is None else replace(output, doses=doses)

    def with_times(self, stats: EngineStats) -> EngineStats:
        """Return the engine's counters with the measured times."""
        return replace(
            stats,
            measured_step_seconds=self._sums.step_seconds,
            measured_edit_seconds=self._sums.edit_seconds,
        )

    async def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    async def _read_while_steered(self) -> None:
        """Read until no steered request runs; a short one is read once, for its steps' times."""
        while True:
            await asyncio.sleep(self._period)
            try:
                answers = await self._call("steering_measurements", ())
            except Exception as error:  # the engine's end is told by its requests
                logger.warning("what the edits did could not be read: %s", error)
                return
            found = Measured()
            for answer in answers:
                found.add(Measured.from_message(answer))
            self._take(found)
            if not self._steered:
                return

    def _take(self, found: Measured) -> None:
        self._sums.step_seconds += found.step_seconds
        self._sums.edit_seconds += found.edit_seconds
        for name in self._steered & found.doses.keys():
            self._doses[name] = tuple(each.mean for each in found.doses[name])
