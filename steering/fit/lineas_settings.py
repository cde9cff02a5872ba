"""The settings of a LinEAS fit."""

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from steering.fit import FitError
from steering.fit.pooling import Pooling

OptimizerName: TypeAlias = Literal["sgd", "adam", "adamw"]

_ADAMW_DECAY: Final = 0.01  # torch's default


@dataclass(frozen=True, slots=True)
class LineasSettings:
    """Settings of a fit. The defaults are the paper's sizes, and a learning rate that suits SGD."""

    samples: int = 32  # sentences drawn from the source
    target_samples: int | None = None  # sentences drawn from the target; None: as many
    steps: int = 1000
    batch_size: int = 32  # sentences of each side in a step; at most those drawn from either
    micro_batch: int | None = None  # sentences in a forward and backward pass; None: the batch
    pooling: Pooling = "mean"
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.1  # at the first step; a cosine takes it to 0
    weight_decay: float | None = None  # of w - 1 and b, AdamW only; None: 0.01
    gamma: float = 0.0  # of the sparse group lasso (`steering.fit.sparsity`); 0: not sparse
    lambda_1: float = 1.0  # its weight for single coordinates
    lambda_group: float = 1.0  # its weight for whole sites
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range, or is not the optimizer's.
        """
        for field in ("samples", "target_samples", "steps", "batch_size", "micro_batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise FitError(f"{field} must be at least 1")
        if self.seed < 0:
            raise FitError("seed must not be negative")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise FitError("learning_rate must be a positive number")
        for field in ("weight_decay", "gamma", "lambda_1", "lambda_group"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise FitError(f"{field} must be a number that is not negative")
        if self.optimizer not in get_args(OptimizerName):
            raise FitError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}")
        if self.pooling not in get_args(Pooling):
            raise FitError(f"pooling must be one of {', '.join(get_args(Pooling))}")
        if self.weight_decay is not None and self.optimizer != "adamw":
            raise FitError(f"weight_decay is a setting of adamw, and not of {self.optimizer}")

    @property
    def target_count(self) -> int:
        """The number of sentences drawn from the target."""
        return self.samples if self.target_samples is None else self.target_samples

    @property
    def decay(self) -> float:
        """AdamW's weight decay."""
        return _ADAMW_DECAY if self.weight_decay is None else self.weight_decay

    @property
    def sentences_in_a_step(self) -> int:
        """The sentences of each side in a step: a batch, or what is drawn if that is fewer."""
        return min(self.batch_size, self.samples, self.target_count)

    @property
    def sentences_in_a_pass(self) -> int:
        """The sentences of one side in a forward and backward pass: a micro-batch, or a step's."""
        return min(self.micro_batch or self.sentences_in_a_step, self.sentences_in_a_step)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a cosine from the first one to 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
