"""Tests of logistic regressions against scikit-learn's and a hand-written, convex objective."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steering.fit import FitError
from steering.fit.logistic import LogisticClassifiers, fit_logistic


def _vectors(
    n: int, m: int, apart: float, classifiers: int = 3, width: int = 4
) -> tuple[Tensor, Tensor]:
    """Each classifier's vectors are a hundred times as long as those of the one before."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-2, 1.0, 1e2][:classifiers], dtype=torch.float64)[:, None, None]
    negatives = torch.randn(classifiers, n, width, generator=random, dtype=torch.float64)
    positives = apart + torch.randn(classifiers, m, width, generator=random, dtype=torch.float64)
    return sizes * negatives, sizes * positives


def _objective(weights: Tensor, intercept: Tensor, negatives: Tensor, positives: Tensor) -> Tensor:
    """One classifier's objective, vector by vector."""
    total = (weights @ weights) / 2
    for vector in negatives:
        total = total + torch.log1p(torch.exp(weights @ vector + intercept))
    for vector in positives:
        total = total + torch.log1p(torch.exp(-(weights @ vector) - intercept))
    return total


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (40, 8), (5, 60)])
def test_they_are_scikit_learns(n: int, m: int, balanced: bool, l2: float) -> None:
    random = torch.Generator().manual_seed(1)
    negatives = torch.randn(2, n, 4, generator=random, dtype=torch.float64)
    positives = 0.5 + torch.randn(2, m, 4, generator=random, dtype=torch.float64)
    fitted = fit_logistic(negatives, positives, l2, balanced=balanced)
    weighting = "balanced" if balanced else None
    for each in range(2):
        expected = LogisticRegression(C=1 / l2, class_weight=weighting, tol=1e-10, max_iter=10_000)
        expected.fit(torch.cat([negatives[each], positives[each]]).numpy(), [0] * n + [1] * m)
        assert fitted.weights[each].tolist() == pytest.approx(expected.coef_[0], abs=1e-5)
        assert fitted.intercepts[each].item() == pytest.approx(expected.intercept_[0], abs=1e-5)


@pytest.mark.parametrize("apart", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 3), (1, 1)])
def test_the_gradient_of_the_objective_is_zero(n: int, m: int, apart: float) -> None:
    negatives, positives = _vectors(n, m, apart)
    fitted = fit_logistic(negatives, positives)
    for each in range(len(negatives)):
        weights = fitted.weights[each].clone().requires_grad_()
        intercept = fitted.intercepts[each].clone().requires_grad_()
        _objective(weights, intercept, negatives[each], positives[each]).backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        assert intercept.grad is not None
        assert weights.grad.abs().max().item() < 1e-6
        assert abs(intercept.grad.item()) < 1e-6


def test_each_classifier_is_fitted_as_if_alone() -> None:
    negatives, positives = _vectors(20, 15, 1.0)
    together = fit_logistic(negatives, positives)
    for each in range(len(negatives)):
        alone = fit_logistic(negatives[each : each + 1], positives[each : each + 1])
        torch.testing.assert_close(together.weights[each], alone.weights[0], rtol=1e-6, atol=1e-9)


def test_vectors_that_do_not_differ_give_the_odds_of_the_counts() -> None:
    fitted = fit_logistic(torch.ones(1, 6, 3).double(), torch.ones(1, 2, 3).double())
    logit = fitted.logits(torch.ones(1, 1, 3).double()).item()
    assert logit == pytest.approx(math.log(2 / 6), abs=1e-6)
    zero = fit_logistic(torch.zeros(1, 6, 3).double(), torch.zeros(1, 2, 3).double())
    assert torch.equal(zero.weights, torch.zeros(1, 3).double())


def test_far_apart_vectors_give_finite_classifiers() -> None:
    fitted = fit_logistic(*_vectors(40, 40, 1e6))
    assert fitted.weights.isfinite().all()
    assert fitted.intercepts.isfinite().all()


def test_accuracies_and_losses_are_counted_vector_by_vector() -> None:
    negatives, positives = _vectors(9, 5, 0.3)
    fitted = LogisticClassifiers(
        torch.randn(3, 4).double(), torch.tensor([0.1, -0.2, 0.3]).double()
    )
    accuracies, losses = (
        fitted.accuracies(negatives, positives),
        fitted.log_losses(negatives, positives),
    )
    for each in range(3):
        right, loss = 0, 0.0
        for vectors, is_positive in ((negatives[each], False), (positives[each], True)):
            for vector in vectors:
                logit = (fitted.weights[each] @ vector + fitted.intercepts[each]).item()
                right += (logit > 0) == is_positive
                loss += float(
                    torch.nn.functional.softplus(torch.tensor(logit * (1 - 2 * is_positive)))
                )
        assert accuracies[each].item() == right / 14
        assert losses[each].item() == pytest.approx(loss, rel=1e-5)


def test_vectors_that_are_not_finite_are_refused() -> None:
    negatives, positives = _vectors(3, 3, 1.0)
    positives[1, 2, 0] = torch.nan
    with pytest.raises(FitError, match="not finite"):
        fit_logistic(negatives, positives)
