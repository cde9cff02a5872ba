"""Tests ARGRE's directions against loops and numpy, and their signs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.fit import FitError
from steering.fit.directions import DirectionName, find_direction


def _differences(pairs: int, seed: int = 0) -> Tensor:
    """Return differences that vary most along (0, 2, -1, 0, ...), around a mean of 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pairs, 8, generator=generator)
    noise[:, 1:3] += 5 * torch.randn(pairs, 1, generator=generator) * torch.tensor([2.0, -1.0])
    return noise + 1


def test_the_mean_difference_is_not_normalised() -> None:
    differences = _differences(5)
    expected = [sum(row[axis] for row in differences.tolist()) / 5 for axis in range(8)]
    torch.testing.assert_close(
        find_direction(differences, "mean-difference"), torch.tensor(expected)
    )


@pytest.mark.parametrize("pairs", [2, 5, 100])  # fewer pairs than coordinates, and more
def test_the_principal_component_is_numpys_leading_eigenvector(pairs: int) -> None:
    differences = _differences(pairs)
    component = find_direction(differences, "principal-component")
    values, vectors = np.linalg.eigh(np.cov(differences.double().numpy(), rowvar=False))
    expected = vectors[:, np.argmax(values)]
    expected *= np.sign(expected @ differences.double().numpy().mean(axis=0))
    np.testing.assert_allclose(component.numpy(), expected, atol=1e-4)
    assert component.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_principal_component_points_from_negatives_to_positives(sign: int) -> None:
    differences = sign * _differences(50)
    component = find_direction(differences, "principal-component")
    assert component @ differences.mean(dim=0) > 0
    assert torch.equal(component, sign * find_direction(_differences(50), "principal-component"))


@pytest.mark.parametrize(
    ("differences", "name", "message"),
    [
        (torch.zeros(3, 4), "mean-difference", "no direction"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "mean-difference", "no direction"),
        (torch.ones(1, 4), "principal-component", "more pairs, or along the mean difference"),
        (torch.ones(9, 4), "principal-component", "more pairs, or along the mean difference"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "principal-component", "no further"),
    ],
)
def test_differences_without_a_direction_are_refused(
    differences: Tensor, name: DirectionName, message: str
) -> None:
    with pytest.raises(FitError, match=message):
        find_direction(differences, name)
