"""The settings of a fit of gates."""

import math
from dataclasses import dataclass

from steering.fit import FitError
from steering.fit.pooling import Pooling


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Settings of the gates' regressions. `components` is as in the paper."""

    components: int = 5  # principal components that the regression sees
    l2: float = 1.0  # weight of the penalty l2 / 2 * |w|^2, beside a sum over sentences
    held_out: float = 0.2  # share of each side's sentences that only measure the accuracy
    seed: int = 0  # of the split
    pooling: Pooling = "mean"  # a sentence's tokens to one vector; the mean, in the paper

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges.

        Raises:
            FitError: a setting is out of its range.
        """
        if self.components < 1:
            raise FitError("the gate's components must be at least 1")
        if not (math.isfinite(self.l2) and self.l2 > 0):
            raise FitError("the gate's l2 must be a positive number")
        if not 0 < self.held_out < 1:
            raise FitError("the share that is held out for the gate must lie between 0 and 1")
        if self.seed < 0:
            raise FitError("seed must not be negative")
