"""Tests of the closed forms against numpy, one neuron at a time, and of degenerate samples."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.closed_forms import couple, linear_transport, mean_shift


def _samples(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Neurons of very different sizes, around very different means."""
    random = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3])
    means = torch.tensor([0.0, -5.0, 0.3, 40.0, 0.0])
    source = means + scales * torch.randn(n, 5, generator=random)
    target = 0.7 * means + 2 * scales * torch.randn(m, 5, generator=random)
    return source, target


def _line_through(source: list[float], target: list[float]) -> tuple[float, float]:
    """Return numpy's slope and intercept through sorted values, each repeated to equal counts."""
    x = np.sort(np.repeat(np.array(source, dtype=np.float64), len(target)))
    y = np.sort(np.repeat(np.array(target, dtype=np.float64), len(source)))
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def _is_finite(map_: AffineMap) -> bool:
    tensors = (map_.weight, map_.bias, map_.low, map_.high)
    return all(bool(each.isfinite().all()) for each in tensors if each is not None)


@pytest.mark.parametrize(("n", "m"), [(32, 32), (2, 2), (7, 5), (5, 40), (12, 8)])
def test_a_linear_transport_is_numpys_line_through_sorted_values(n: int, m: int) -> None:
    source, target = _samples(n, m)
    map_ = linear_transport(source, target)
    for neuron in range(source.shape[1]):
        slope, intercept = _line_through(source[:, neuron].tolist(), target[:, neuron].tolist())
        assert map_.weight[neuron].item() == pytest.approx(slope, rel=1e-6)
        assert map_.bias[neuron].item() == pytest.approx(intercept, rel=1e-5, abs=1e-6)
    assert (map_.weight > 0).all()  # an optimal map keeps the order


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (1, 3)])
def test_a_coupling_has_both_samples_as_its_margins(n: int, m: int) -> None:
    source, target = _samples(n, m)
    x, y, shares = couple(source, target)
    assert shares.sum().item() == pytest.approx(1)
    for values, sample in ((x, source), (y, target)):
        for neuron in range(source.shape[1]):
            for value in sample[:, neuron].double():
                share = shares[values[:, neuron] == value].sum().item()
                assert share == pytest.approx(1 / len(sample))
        assert (values.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("quantiles", [(0.0, 1.0), (0.05, 0.95), (0.005, 0.995), (0.25, 0.3)])
@pytest.mark.parametrize("n", [2, 11, 40])
def test_a_support_is_numpys_quantiles_of_the_source(
    n: int, quantiles: tuple[float, float]
) -> None:
    source, target = _samples(n, 7)
    map_ = linear_transport(source, target, quantiles)
    expected = np.quantile(source.numpy().astype(np.float64), quantiles, axis=0)
    assert map_.low is not None
    assert map_.high is not None
    torch.testing.assert_close(map_.low.double(), torch.from_numpy(expected[0]))
    torch.testing.assert_close(map_.high.double(), torch.from_numpy(expected[1]))


def test_the_whole_range_includes_every_source_value() -> None:
    source, target = _samples(9, 9)
    map_ = linear_transport(source, target)
    assert map_.low is not None
    assert map_.high is not None
    assert ((source >= map_.low) & (source <= map_.high)).all()
    unlimited = linear_transport(source, target, None)
    assert (unlimited.low, unlimited.high) == (None, None)
    assert torch.equal(unlimited.weight, map_.weight)


@pytest.mark.parametrize(("n", "m"), [(8, 8), (1, 1), (3, 50)])
def test_a_mean_shift_is_the_difference_of_the_means(n: int, m: int) -> None:
    source, target = _samples(n, m)
    map_ = mean_shift(source, target)
    expected = target.numpy().astype(np.float64).mean(0) - source.numpy().astype(np.float64).mean(0)
    torch.testing.assert_close(map_.bias.double(), torch.from_numpy(expected))
    assert torch.equal(map_.weight, torch.ones(5))
    assert (map_.low, map_.high) == (None, None)


def test_the_shift_of_pairs_is_the_mean_of_their_differences() -> None:
    source, target = _samples(13, 13)
    expected = (target - source).mean(0)
    torch.testing.assert_close(mean_shift(source, target).bias, expected)


def test_equal_samples_give_the_identity_exactly() -> None:
    source, _ = _samples(33, 1)
    shuffled = source[torch.randperm(33, generator=torch.Generator().manual_seed(1))]
    map_ = linear_transport(source, shuffled)
    assert torch.equal(map_.weight, torch.ones(5))
    assert torch.equal(map_.bias, torch.zeros(5))
    assert torch.equal(mean_shift(source, source).bias, torch.zeros(5))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-30])
def test_a_constant_source_neuron_is_shifted_and_not_stretched(value: float) -> None:
    random = torch.Generator().manual_seed(2)
    source = torch.full((6, 2), value)
    source[0] *= 1 + 1e-7  # what a padded batch changes
    target = 3 + torch.randn(6, 2, generator=random)
    map_ = linear_transport(source, target)
    assert torch.equal(map_.weight, torch.ones(2))
    torch.testing.assert_close(map_.bias, target.mean(0) - source.mean(0))
    assert _is_finite(map_)


def test_a_constant_target_neuron_collapses_the_source_on_it() -> None:
    source, _ = _samples(6, 1)
    map_ = linear_transport(source, torch.full((4, 5), 2.0))
    torch.testing.assert_close(map_.weight, torch.zeros(5), atol=1e-9, rtol=0)
    torch.testing.assert_close(map_.bias, torch.full((5,), 2.0))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0)])
def test_an_empty_side_is_refused(n: int, m: int) -> None:
    side = "source" if n == 0 else "target"
    for closed_form in (linear_transport, mean_shift):
        with pytest.raises(FitError, match=f"no {side} sentence"):
            closed_form(torch.ones(n, 2), torch.ones(m, 2))


@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 1)])
def test_a_slope_needs_two_sentences_on_each_side(n: int, m: int) -> None:
    with pytest.raises(FitError, match=f"the source has {n}, the target {m}"):
        linear_transport(torch.ones(n, 2), torch.ones(m, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    bad, good = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 1] = value
    for closed_form in (linear_transport, mean_shift):
        with pytest.raises(FitError, match="source sentences are not finite"):
            closed_form(bad, good)
        with pytest.raises(FitError, match="target sentences are not finite"):
            closed_form(good, bad)


@pytest.mark.parametrize(
    "quantiles", [(0.9, 0.1), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.5), (0.0, math.nan)]
)
def test_a_support_out_of_order_or_range_is_refused(quantiles: tuple[float, float]) -> None:
    with pytest.raises(FitError, match="the lower one first"):
        linear_transport(*_samples(3, 3), quantiles)
