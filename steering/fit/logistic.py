"""Fits logistic regressions, many at once: each tells two sets of vectors apart by a hyperplane."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from steering.fit import FitError

_STEPS: Final = 100
_HALVINGS: Final = 40
_TOLERANCE: Final = 1e-8  # of the gradient's largest component
_SMALLEST_CURVATURE: Final = 1e-12
_ROUNDING: Final = 1e-12  # of an objective, relative


@dataclass(frozen=True, slots=True, eq=False)
class LogisticClassifiers:
    """Classifiers of vectors of one width, for example one for each attention head.

    A vector z is on the positive side if `weights . z + intercept` is above 0.
    """

    weights: Tensor  # (classifiers, width) float64
    intercepts: Tensor  # (classifiers,) float64

    def logits(self, vectors: Tensor) -> Tensor:
        """Return the log odds of the positive side: (classifiers, n, width) -> (classifiers, n)."""
        return (vectors @ self.weights[:, :, None]).squeeze(-1) + self.intercepts[:, None]

    def log_losses(self, negatives: Tensor, positives: Tensor) -> Tensor:
        """Return each classifier's log loss, summed over both sides: (classifiers,)."""
        losses = functional.softplus(self.logits(negatives)).sum(1)
        return losses + functional.softplus(-self.logits(positives)).sum(1)

    def accuracies(self, negatives: Tensor, positives: Tensor) -> Tensor:
        """Return the share of vectors that each puts on their side: (classifiers,) float64."""
        right = (self.logits(negatives) <= 0).sum(1) + (self.logits(positives) > 0).sum(1)
        return right.double() / (negatives.shape[1] + positives.shape[1])

    def minus(self, step: Tensor) -> "LogisticClassifiers":
        """Return the classifiers after a step, (classifiers, width + 1), the intercept last."""
        return LogisticClassifiers(self.weights - step[:, :-1], self.intercepts - step[:, -1])


def fit_logistic(
    negatives: Tensor, positives: Tensor, l2: float = 1.0, *, balanced: bool = False
) -> LogisticClassifiers:
    """Fit a logistic regression to each pair of sides, with scikit-learn's objective.

    The sum of the log losses plus l2 ||weights||^2 / 2, which is convex, is minimised by Newton's
    method; a step is halved until the objective falls. These are the classifiers of
    `LogisticRegression(C=1 / l2)`, with `class_weight="balanced"` if they are balanced.

    Args:
        negatives: (classifiers, n, width) float64, n > 0.
        positives: (classifiers, m, width) float64, m > 0.
        l2: weight of the penalty on the weights, above 0; the intercept has none.
        balanced: True if both sides count equally, however many vectors each has: a vector's loss
            is multiplied by (n + m) / (2 * the number on its side).

    Raises:
        FitError: a value is not finite.
    """
    vectors = torch.cat([negatives, positives], dim=1)
    if not vectors.isfinite().all():
        raise FitError("the model's activations are not finite on these sentences")
    objective = _Objective.of_sides(vectors, negatives.shape[1], l2, balanced)
    count, _, width = vectors.shape
    fitted = LogisticClassifiers(vectors.new_zeros(count, width), vectors.new_zeros(count))
    for _ in range(_STEPS):
        gradient, step = objective.newton_step(fitted)
        if gradient.abs().max() <= _TOLERANCE:
            break
        fitted = _descend(objective, fitted, step, (gradient * step).sum(1))
    return fitted


@dataclass(frozen=True, slots=True, eq=False)
class _Objective:
    vectors: Tensor  # (classifiers, n + m, width)
    sides: Tensor  # (n + m,), -1 for negatives and 1 for positives
    factors: Tensor  # (n + m,), of the vectors' losses
    l2: float

    @classmethod
    def of_sides(cls, vectors: Tensor, negatives: int, l2: float, balanced: bool) -> "_Objective":
        """Make the objective of vectors of which the first are negatives."""
        sides, factors = vectors.new_ones(2, vectors.shape[1])
        sides[:negatives] = -1
        if balanced:
            factors[:negatives] = len(sides) / (2 * negatives)
            factors[negatives:] = len(sides) / (2 * (len(sides) - negatives))
        return cls(vectors, sides, factors, l2)

    def values(self, at: LogisticClassifiers) -> Tensor:
        """Return the objective of each: (classifiers,)."""
        losses = functional.softplus(-self.sides * at.logits(self.vectors)) @ self.factors
        return losses + self.l2 * at.weights.square().sum(1) / 2

    def newton_step(self, at: LogisticClassifiers) -> tuple[Tensor, Tensor]:
        """Return gradients and Newton steps, each (classifiers, width + 1), the intercept last."""
        inputs = functional.pad(self.vectors, (0, 1), value=1.0)
        wrong = torch.sigmoid(-self.sides * at.logits(self.vectors))
        pull = ((self.factors * self.sides * wrong)[:, None] @ inputs)[:, 0]
        gradient = functional.pad(self.l2 * at.weights, (0, 1)) - pull
        # The intercept has no penalty; where every vector is far from the hyperplane, its
        # curvature rounds to 0.
        penalty = torch.full_like(at.weights, self.l2)
        penalty = functional.pad(penalty, (0, 1), value=_SMALLEST_CURVATURE)
        curvature = (self.factors * wrong * (1 - wrong))[:, :, None]
        hessian = inputs.mT @ (curvature * inputs) + torch.diag_embed(penalty)
        return gradient, torch.linalg.solve(hessian, gradient)


def _descend(
    objective: _Objective, fitted: LogisticClassifiers, step: Tensor, slopes: Tensor
) -> LogisticClassifiers:
    """Return the classifiers after their steps, each halved until its objective falls."""
    before = objective.values(fitted)
    scales = torch.ones_like(slopes)
    for _ in range(_HALVINGS):
        moved = fitted.minus(scales[:, None] * step)
        bound = before * (1 + _ROUNDING) - 1e-4 * scales * slopes
        rose = objective.values(moved) > bound
        if not rose.any():
            return moved
        scales = torch.where(rose, scales / 2, scales)
    return fitted.minus(torch.where(rose, 0, scales)[:, None] * step)
