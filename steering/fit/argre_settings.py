"""Settings of an ARGRE fit."""

import math
from dataclasses import dataclass

from steering.fit import FitError
from steering.fit.directions import DIRECTION_NAMES, DirectionName


@dataclass(frozen=True, slots=True)
class ArgreSettings:
    """Settings of a fit. The defaults are the authors', except where a comment says otherwise."""

    hidden_units: int = 1024  # m, of the head
    direction: DirectionName = "mean-difference"  # the authors' code; the paper's text: the other
    interpolations: int = 7  # N_in, points between the two ends of a pair's path
    beta: float = 0.05  # beta_r, scale of the preference in the loss
    center: float = 0.01  # weight of the loss term that keeps rewards around 0
    neutral_weight: float = 1.0  # weight of `preferences.shortfall` of neutral texts; ours
    epochs: int = 3
    batch_size: int = 4  # pairs in a step
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 100  # at most a tenth of all steps; the authors' 100 have no such limit
    # Share of the pairs that select the checkpoint and are never trained on, rounded down to whole
    # pairs. The authors take 500 pairs of another file.
    held_out: float = 0.1
    # Quantile of the positives' token rewards that becomes r_plus; None: their mean, the authors'.
    reward_quantile: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range.
        """
        if min(self.hidden_units, self.epochs, self.batch_size) < 1:
            raise FitError("hidden_units, epochs and batch_size must be at least 1")
        if min(self.interpolations, self.warmup_steps, self.seed) < 0:
            raise FitError("interpolations, warmup_steps and seed must not be negative")
        rates = (self.beta, self.learning_rate)
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise FitError("beta and learning_rate must be positive numbers")
        weights = (self.center, self.weight_decay, self.neutral_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise FitError(
                "center, weight_decay and neutral_weight must be numbers and not negative"
            )
        if self.direction not in DIRECTION_NAMES:
            raise FitError(f"direction must be one of {', '.join(DIRECTION_NAMES)}")
        if not 0 <= self.held_out < 1:
            raise FitError("held_out must be a share from 0 to below 1")
        if self.reward_quantile is not None and not 0 <= self.reward_quantile <= 1:
            raise FitError("reward_quantile must be from 0 to 1")
