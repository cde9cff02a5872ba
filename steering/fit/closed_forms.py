"""The closed forms of affine maps between two samples of activations, neuron by neuron.

x are a neuron's values in the source sentences, y those in the target sentences:

    linear transport    w, b = argmin sum_i (w x_i + b - y_i)^2  over sorted x and y
    mean shift          w = 1, b = mean(y) - mean(x)
"""

from typing import Final, TypeAlias

import torch
from torch import Tensor

from steering.affine import AffineMap
from steering.fit import FitError

Quantiles: TypeAlias = tuple[float, float]

WHOLE_RANGE: Final[Quantiles] = (0.0, 1.0)
# Activations whose standard deviation is below this share of the largest differ by the rounding of
# float32 only.
_ROUNDING: Final = 1e-6


def linear_transport(
    source: Tensor, target: Tensor, support: Quantiles | None = WHOLE_RANGE
) -> AffineMap:
    """Return Lin-AcT's map.

    A neuron that is constant over the source sentences has no slope: it is shifted as by Mean-AcT.

    Args:
        source: (n, d) float32.
        target: (m, d) float32. Where m is not n, the least squares are over the optimal coupling
            of the two distributions, which splits a sentence's weight between neighbours in order.
        support: quantiles of the source, 0 to 1, between which a coordinate is mapped; None maps
            every value.

    Raises:
        FitError: fewer than 2 sentences on a side, an activation that is not finite, or quantiles
            that are out of range or order.
    """
    _check(source, target)
    if min(len(source), len(target)) < 2:
        raise FitError(
            "Lin-AcT fits a slope, which needs at least 2 sentences on each side: the source has "
            f"{len(source)}, the target {len(target)} (Mean-AcT and CAA need 1)"
        )
    if support is not None:
        check_support(support)
    x, y, shares = couple(source, target)
    x_mean, y_mean = (shares * x).sum(0), (shares * y).sum(0)
    x_centred, y_centred = x - x_mean, y - y_mean
    weighted = shares * x_centred  # so that a slope is exactly 1 where both sides are equal
    variance = (weighted * x_centred).sum(0)
    varies = variance.sqrt() > _ROUNDING * x.abs().amax(0)
    slope = (weighted * y_centred).sum(0) / torch.where(varies, variance, 1)
    weight = torch.where(varies, slope, 1)
    bias = y_mean - weight * x_mean
    low, high = (None, None) if support is None else _quantiles(source, support)
    return AffineMap(weight=weight.float(), bias=bias.float(), low=low, high=high)


def check_support(quantiles: Quantiles) -> None:
    """Refuse quantiles that hold no range.

    Raises:
        FitError: they are not 0 <= low < high <= 1.
    """
    low, high = quantiles
    if not 0 <= low < high <= 1:
        raise FitError(
            f"the quantiles must lie between 0 and 1, the lower one first, not {low:g} and {high:g}"
        )


def mean_shift(source: Tensor, target: Tensor) -> AffineMap:
    """Return the map of Mean-AcT and CAA: (n, d) and (m, d) float32.

    Raises:
        FitError: no sentence on a side, or an activation that is not finite.
    """
    _check(source, target)
    bias = (target.double().mean(0) - source.double().mean(0)).float()
    return AffineMap(weight=torch.ones_like(bias), bias=bias)


def couple(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the optimal coupling of two samples of each neuron, as weighted sorted pairs.

    Returns:
        x and y, (pairs, d) float64, and the pairs' weights, (pairs, 1) float64, of sum 1. For
        samples of equal size n there are n pairs.
    """
    n, m = len(source), len(target)
    # In units of 1 / (n m), source value i takes up [i m, (i + 1) m) of the weight.
    steps = [torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]
    ends = torch.cat(steps).unique()  # type: ignore[no-untyped-call]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    shares = ((ends - starts).double() / (n * m))[:, None].to(source.device)
    x = source.double().sort(dim=0).values[(starts // m).to(source.device)]
    y = target.double().sort(dim=0).values[(starts // n).to(source.device)]
    return x, y, shares


def _check(source: Tensor, target: Tensor) -> None:
    for side, states in (("source", source), ("target", target)):
        if len(states) == 0:
            raise FitError(f"there is no {side} sentence")
        if not states.isfinite().all():
            raise FitError(f"the model's activations on the {side} sentences are not finite")


def _quantiles(states: Tensor, shares: Quantiles) -> tuple[Tensor, Tensor]:
    """Return two quantiles of each neuron, (d,) each, interpolated linearly.

    torch.quantile refuses tensors of more than 16 million numbers.
    """
    ordered = states.sort(dim=0).values
    low, high = (share * (len(states) - 1) for share in shares)
    return _between(ordered, low), _between(ordered, high)


def _between(ordered: Tensor, place: float) -> Tensor:
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
