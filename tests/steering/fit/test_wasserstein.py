"""Tests 1-D Wasserstein distances and LinEAS's loss against loops over sorted numbers."""

import pytest
import torch
from torch import Tensor

from steering.fit.wasserstein import distributional_loss, quantiles, squared_wasserstein


def _quantile(values: list[float], level: float) -> float:
    """Return a quantile, with straight lines between the values at (j - 1/2)/m."""
    ordered, size = sorted(values), len(values)
    if level <= 0.5 / size:
        return ordered[0]
    for j in range(1, size):
        low, high = (j - 0.5) / size, (j + 0.5) / size
        if level <= high:
            share = (level - low) / (high - low)
            return ordered[j - 1] + share * (ordered[j] - ordered[j - 1])
    return ordered[-1]


@pytest.mark.parametrize(("size", "count"), [(5, 5), (7, 3), (3, 7), (1, 4), (4, 1), (9, 3)])
def test_quantiles_are_what_loops_compute(size: int, count: int) -> None:
    torch.manual_seed(0)
    samples = torch.randn(size, 3, dtype=torch.float64)
    found = quantiles(samples, count)
    assert found.shape == (count, 3)
    for neuron in range(3):
        for i in range(1, count + 1):
            expected = _quantile(samples[:, neuron].tolist(), (i - 0.5) / count)
            assert found[i - 1, neuron].item() == pytest.approx(expected, abs=1e-12)


def test_a_quantile_that_is_a_values_own_is_this_value() -> None:
    samples = torch.randn(9, 4)
    assert torch.equal(quantiles(samples, 3), samples.sort(dim=0).values[[1, 4, 7]])


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9), (9, 4)])
def test_the_distance_is_what_loops_compute(n: int, m: int) -> None:
    torch.manual_seed(1)
    source, target = torch.randn(n, 3), 2 * torch.randn(m, 3) + 1
    distances = squared_wasserstein(source, target)
    for neuron in range(3):
        ordered = sorted(source[:, neuron].tolist())
        theirs = [_quantile(target[:, neuron].tolist(), (i - 0.5) / n) for i in range(1, n + 1)]
        expected = sum((x - y) ** 2 for x, y in zip(ordered, theirs, strict=True)) / n
        assert distances[neuron].item() == pytest.approx(expected, rel=1e-4)


def test_samples_of_one_distribution_are_close_whatever_their_sizes() -> None:
    torch.manual_seed(2)
    source, target = torch.randn(200, 1), torch.randn(2000, 1)
    near = squared_wasserstein(source, target).item()
    assert near < 0.05
    assert squared_wasserstein(source, target + 1).item() == pytest.approx(1, abs=0.3)


def test_the_loss_is_what_loops_compute() -> None:
    torch.manual_seed(0)
    source = {"a": torch.randn(5, 3), "b": torch.randn(5, 4)}
    target = {"a": torch.randn(5, 3), "b": torch.randn(5, 4)}
    by_site = []
    for site, rows in source.items():
        by_neuron = []
        for neuron in range(rows.shape[1]):
            ours = sorted(rows[:, neuron].tolist())
            theirs = sorted(target[site][:, neuron].tolist())
            by_neuron.append(sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)))
        by_site.append(sum(by_neuron) / len(by_neuron))
    assert distributional_loss(source, target).item() == pytest.approx(sum(by_site) / 2, rel=1e-5)


def test_the_losss_gradient_moves_each_value_towards_its_partner() -> None:
    source = torch.tensor([[3.0], [1.0]], requires_grad=True)
    loss = distributional_loss({"a": source}, {"a": torch.tensor([[0.0], [5.0], [5.0], [0.0]])})
    loss.backward()  # type: ignore[no-untyped-call]
    # The target at the quantiles 1/4 and 3/4 is 0 and 5: 1 goes to 0, and 3 to 5.
    assert loss.item() == pytest.approx(1 + 4)
    gradient: Tensor | None = source.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.tensor([[-4.0], [2.0]]))
