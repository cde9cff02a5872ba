"""1-D Wasserstein distances between samples, neuron by neuron, and LinEAS's loss over sites.

The squared 2-Wasserstein distance between two sorted samples of n values each is the mean of their
squared differences. Samples of unequal size are compared at the quantiles (i - 1/2)/n: the j-th of
m sorted values is taken for the quantile (j - 1/2)/m, with straight lines between the values, and
the smallest and largest value beyond the ends. At equal sizes this gives the sorted values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def quantiles(samples: Tensor, count: int) -> Tensor:
    """Return each neuron's values at the quantiles (i - 1/2)/count, i = 1..count.

    Args:
        samples: (m, d) floating, m at least 1, in any order.
        count: number of quantiles, at least 1.

    Returns:
        (count, d), in increasing order; the sorted samples if `count` is m. Differentiable.
    """
    ordered = samples.sort(dim=0).values
    size = len(samples)
    if size == count:
        return ordered
    # In half steps between the values, counted in integers so that a quantile that is a value's
    # own gives exactly this value.
    halves = (2 * torch.arange(count) + 1) * size - count
    position = (halves.double() / (2 * count)).clamp(0, size - 1)
    below = position.floor().long().clamp(max=max(size - 2, 0))
    above = (below + 1).clamp(max=size - 1)
    weight = (position - below)[:, None].to(ordered)
    return torch.lerp(ordered[below], ordered[above], weight)


def squared_wasserstein(source: Tensor, target: Tensor) -> Tensor:
    """Return each neuron's squared 2-Wasserstein distance between two samples.

    Args:
        source: (n, d) floating.
        target: (m, d); if m is not n, its values at the quantiles (i - 1/2)/n are taken.

    Returns:
        (d,), in squared units of the samples. Differentiable.
    """
    return (source.sort(dim=0).values - quantiles(target, len(source))).square().mean(dim=0)


def distributional_loss(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Return the loss C of `steering.fit.lineas`.

    Args:
        source: site -> (n, d) float32.
        target: the same sites, (m, d) each; m need not be n.

    Returns:
        () float32, in squared units of the activations.
    """
    per_site = [
        len(source[site]) * squared_wasserstein(source[site], target[site]).mean()
        for site in target
    ]
    return torch.stack(per_site).mean()
