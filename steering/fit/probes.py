"""Fits logistic probes, many at once: each tells two sets of vectors apart by a hyperplane."""

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
class Probes:
    """One probe for each attention head, or whatever else gives vectors of one width.

    A vector z is on the positive side if `weights . z + intercept` is above 0.
    """

    weights: Tensor  # (probes, width) float64
    intercepts: Tensor  # (probes,) float64

    def logits(self, vectors: Tensor) -> Tensor:
        """Return the log odds of the positive side: (probes, n, width) -> (probes, n)."""
        return (vectors @ self.weights[:, :, None]).squeeze(-1) + self.intercepts[:, None]

    def log_losses(self, negatives: Tensor, positives: Tensor) -> Tensor:
        """Return each probe's log loss, summed over the vectors of both sides: (probes,)."""
        losses = functional.softplus(self.logits(negatives)).sum(1)
        return losses + functional.softplus(-self.logits(positives)).sum(1)

    def accuracies(self, negatives: Tensor, positives: Tensor) -> Tensor:
        """Return the share of vectors that each probe puts on their side: (probes,) float64."""
        right = (self.logits(negatives) <= 0).sum(1) + (self.logits(positives) > 0).sum(1)
        return right.double() / (negatives.shape[1] + positives.shape[1])


def fit_probes(negatives: Tensor, positives: Tensor) -> Probes:
    """Fit a logistic regression for each probe, with scikit-learn's default objective.

    The sum of the log losses plus ||weights||^2 / 2, which is convex, is minimised by Newton's
    method; a step is halved until the objective falls.

    Args:
        negatives: (probes, n, width) float64, n > 0.
        positives: (probes, m, width) float64, m > 0.

    Raises:
        FitError: a value is not finite.
    """
    vectors = torch.cat([negatives, positives], dim=1)
    if not vectors.isfinite().all():
        raise FitError("the model's activations are not finite on these sentences")
    count, examples, width = vectors.shape
    sides = torch.ones(examples, dtype=vectors.dtype, device=vectors.device)
    sides[: negatives.shape[1]] = -1
    probes = Probes(vectors.new_zeros(count, width), vectors.new_zeros(count))
    for _ in range(_STEPS):
        gradient, step = _newton_step(probes, vectors, sides)
        if gradient.abs().max() <= _TOLERANCE:
            break
        probes = _descend(probes, step, (gradient * step).sum(1), negatives, positives)
    return probes


def _newton_step(probes: Probes, vectors: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients and Newton steps, each (probes, width + 1) with the intercept at the end."""
    inputs = functional.pad(vectors, (0, 1), value=1.0)
    wrong = torch.sigmoid(-sides * probes.logits(vectors))
    gradient = functional.pad(probes.weights, (0, 1)) - ((sides * wrong)[:, None] @ inputs)[:, 0]
    # The intercept has no penalty; where every vector is far from the hyperplane, its curvature
    # rounds to 0.
    penalty = functional.pad(torch.ones_like(probes.weights), (0, 1), value=_SMALLEST_CURVATURE)
    curvature = (wrong * (1 - wrong))[:, :, None]
    hessian = inputs.mT @ (curvature * inputs) + torch.diag_embed(penalty)
    return gradient, torch.linalg.solve(hessian, gradient)


def _descend(
    probes: Probes, step: Tensor, slopes: Tensor, negatives: Tensor, positives: Tensor
) -> Probes:
    """Return the probes after their steps, each halved until its objective falls."""
    before = _objectives(probes, negatives, positives)
    scales = torch.ones_like(slopes)
    for _ in range(_HALVINGS):
        moved = _moved(probes, scales[:, None] * step)
        bound = before * (1 + _ROUNDING) - 1e-4 * scales * slopes
        rose = _objectives(moved, negatives, positives) > bound
        if not rose.any():
            return moved
        scales = torch.where(rose, scales / 2, scales)
    return _moved(probes, torch.where(rose, 0, scales)[:, None] * step)


def _moved(probes: Probes, step: Tensor) -> Probes:
    return Probes(probes.weights - step[:, :-1], probes.intercepts - step[:, -1])


def _objectives(probes: Probes, negatives: Tensor, positives: Tensor) -> Tensor:
    return probes.log_losses(negatives, positives) + probes.weights.square().sum(1) / 2
