"""Measures how large the edits of some steps are, and how long they take."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from server.engine.vllm.plugin.site_edits import StepBuffers
from server.engine.vllm.plugin.wire import Measured
from steering.dose import DoseMeter
from steering.route import Route, Span

_KEPT: Final = 256  # measured steps that nobody has read; older ones are dropped


@dataclass(slots=True, eq=False)
class _Step:
    """A measured step."""

    spans: tuple[Span, ...]
    names: tuple[str, ...]  # of the spans' requests
    route: Route
    meter: DoseMeter
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0  # the step's duration, as far as it was told
    edit_seconds: float = 0.0
    sums: Tensor | None = None  # its doses, see `DoseMeter.sums`


class Measuring:
    """Measures one of so many steered steps, and keeps what it found until it is read.

    Sums of doses stay on the device until then, so that no step waits for one.
    """

    def __init__(self, buffers: StepBuffers) -> None:
        self._buffers = buffers
        self._on_cpu = buffers.used_flags.device.type == "cpu"  # only there clocks tell anything
        self._interval = 0  # steered steps for each that is measured; 0: none is
        self._steered_steps = 0
        self._step: _Step | None = None  # the one that is being computed, if it is measured
        self._measured: deque[_Step] = deque(maxlen=_KEPT)

    def restart(self, interval: int) -> None:
        """Measure one of `interval` steered steps from now on; forget what was measured."""
        self._interval = interval
        self._steered_steps = 0
        self._step = None
        self._measured.clear()

    def begin(self, spans: Sequence[Span], names: Sequence[str], route: Route) -> bool:
        """Begin a step.

        Args:
            spans: the step's.
            names: of the spans' requests, as `read` tells them.
            route: the step's.

        Returns:
            True if it is to be measured.
        """
        self._finish()
        if not self._interval or not route.edits_anything:
            return False
        self._steered_steps += 1
        if (self._steered_steps - 1) % self._interval:
            return False
        tokens, rows = (sum(each) for each in zip(*map(_size, spans), strict=True))
        self._step = _Step(tuple(spans), tuple(names), route, DoseMeter(tokens, rows))
        return True

    @property
    def meter(self) -> DoseMeter | None:
        """The meter of the step that is being computed, if it is measured, for its rewards."""
        return None if self._step is None else self._step.meter

    def lap(self) -> None:
        """Tell that a part of the step's work is done. The last part ends the step's time."""
        if self._step is not None:
            self._step.seconds = time.perf_counter() - self._step.began

    def read(self) -> Measured:
        """Return what was measured since this was last called. This waits for the device."""
        self._finish()
        found = Measured()
        while self._measured:
            step = self._measured.popleft()
            assert step.sums is not None, "a step is kept when it is finished"
            totals = step.meter.totals_of(step.sums.cpu(), step.spans)
            found.add(
                Measured(
                    step.seconds,
                    step.edit_seconds,
                    {name: each for name, each in zip(step.names, totals, strict=True) if each},
                )
            )
        return found

    def _finish(self) -> None:
        """Keep the measured step's doses and times before its buffers are overwritten."""
        step, self._step = self._step, None
        if step is None:
            return
        meter, affine = step.meter, step.route.affine
        if affine is not None:
            doses = self._buffers.doses_of(affine)
            meter.affine_doses(affine.indices, doses.device).copy_(doses)
        step.sums = meter.sums(self._buffers.used_flags.device)
        if self._on_cpu:
            editing, measuring = self._affine_seconds(step)
            step.edit_seconds = editing + meter.edit_seconds
            # A step of which no part was told, because it failed, took no time.
            step.seconds = max(0.0, step.seconds - measuring - meter.measuring_seconds)
        else:
            step.seconds = 0.0
        self._measured.append(step)

    def _affine_seconds(self, step: _Step) -> tuple[float, float]:
        """Return the time of the step's edits at sites, and that of measuring them."""
        if step.route.affine is None:  # the buffer holds those of another step
            return 0.0, 0.0
        editing, measuring = self._buffers.step.seconds.tolist()
        return editing, measuring


def _size(span: Span) -> tuple[int, int]:
    return span.count, len(span.rows)
