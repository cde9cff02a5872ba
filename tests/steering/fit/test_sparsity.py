"""Tests the proximal step of the sparse group lasso against loops, and the support."""

import math

import pytest
import torch

from steering.affine import AffineMap
from steering.fit.sparsity import Support, proximal_step, support_of


def _oracle(x: list[float], tau: float, lambda_1: float, lambda_group: float) -> list[float]:
    soft = [math.copysign(max(abs(value) - tau * lambda_1, 0.0), value) for value in x]
    norm = math.sqrt(sum(value * value for value in soft))
    if norm == 0:
        return [0.0] * len(x)
    scale = max(1 - tau * lambda_group * math.sqrt(len(x)) / norm, 0.0)
    return [scale * value for value in soft]


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0), (0.0, 0.0)])
def test_a_step_is_what_loops_compute(tau: float, weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    x = torch.randn(7)
    expected = torch.tensor(_oracle(x.tolist(), tau, *weights))
    torch.testing.assert_close(proximal_step(x, tau, *weights), expected, atol=1e-6, rtol=1e-5)


def test_a_step_of_hand_computed_numbers() -> None:
    """The step of (3, -0.5, -4): soft (2, 0, -3), norm sqrt(13), scale 1 - 0.5 sqrt(3/13)."""
    scale = 1 - 0.5 * math.sqrt(3 / 13)
    stepped = proximal_step(torch.tensor([3.0, -0.5, -4.0]), 1.0, 1.0, 0.5)
    torch.testing.assert_close(stepped, torch.tensor([2 * scale, 0.0, -3 * scale]))


def test_what_is_taken_away_is_exactly_zero() -> None:
    assert torch.equal(proximal_step(torch.tensor([0.2, -0.1]), 1.0, 1.0, 0.0), torch.zeros(2))
    assert torch.equal(proximal_step(torch.full((4,), 0.5), 1.0, 0.0, 1.0), torch.zeros(4))
    assert torch.equal(proximal_step(torch.zeros(3), 0.0, 1.0, 1.0), torch.zeros(3))


def test_a_coordinate_counts_if_its_weight_or_its_bias_does_something() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3)
    maps = {
        "weight": AffineMap(torch.tensor([1.0, 0.5, 1.0]), zeros),
        "bias": AffineMap(ones, torch.tensor([1.0, 0.0, -1.0])),
        "both": AffineMap(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])),
        "identity": AffineMap(ones, zeros),
    }
    assert support_of(maps) == Support(
        sites_fitted=4, sites_kept=3, coordinates_fitted=12, coordinates_kept=4
    )
