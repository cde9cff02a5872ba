"""The direction, the interpolated preference pairs and the loss that ARGRE learns from.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). With `h+`, `h-` the hidden states before the head (after the final norm) of a
pair's positive and negative text:

    direction d = mean over pairs of (last token of h+  -  last token of h-),   unit = d / ||d||
    h(alpha) = h+ + alpha ((h- - h+) . unit) unit,  alpha in linspace(0, 1, interpolations + 2)

over the token positions that both texts have. Of two neighbouring points on this path, `chosen` is
the one nearer to h+. With r summed over tokens (and r_bar its mean over tokens) the loss is

    -log sigmoid(beta (r(chosen) - r(rejected))) + center mean((r_bar(chosen) + r_bar(rejected))^2)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def mean_direction(positives: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
    """Return the direction d, not normalised: pairs of (tokens, width) -> (width,), all float32."""
    differences = [
        positive[-1] - negative[-1] for positive, negative in zip(positives, negatives, strict=True)
    ]
    return torch.stack(differences).mean(dim=0)


def interpolate(positive: Tensor, negative: Tensor, unit: Tensor, interpolations: int) -> Tensor:
    """Return the path h(alpha) of the module's docstring.

    Args:
        positive: (..., width) float32.
        negative: the same shape.
        unit: (width,) float32, of length 1.
        interpolations: number of points between the two ends.

    Returns:
        (interpolations + 2, ..., width) float32, beginning with the positive.
    """
    along = ((negative - positive) @ unit)[..., None] * unit
    alphas = torch.linspace(0, 1, interpolations + 2, device=positive.device)
    return positive + alphas.view(-1, *([1] * positive.dim())) * along


def preference_loss(rewards: Tensor, mask: Tensor, beta: float, center: float) -> Tensor:
    """Return the module's loss, averaged over the neighbours on all pairs' paths.

    Args:
        rewards: (points, pairs, tokens) float32, beginning with the positive.
        mask: (pairs, tokens) bool, True for tokens that both texts have; at least one for each
            pair.
        beta: scale of the preference.
        center: weight of the term that keeps rewards around 0.

    Returns:
        () float32.
    """
    sums = (rewards * mask).sum(dim=-1)
    means = sums / mask.sum(dim=-1)
    preference = -functional.logsigmoid(beta * (sums[:-1] - sums[1:])).mean()
    return preference + center * (means[:-1] + means[1:]).square().mean()


def common_tokens(
    positives: Sequence[Tensor], negatives: Sequence[Tensor], rows: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token positions that both texts of each pair have, as one batch.

    Args:
        positives: one (tokens, width) float32 tensor for each pair.
        negatives: likewise.
        rows: the indices of the batch's pairs; at least one.

    Returns:
        Positives and negatives, (pairs, tokens, width) float32 each, with zeros for padding; and
        the mask, (pairs, tokens) bool.
    """
    lengths = [min(len(positives[row]), len(negatives[row])) for row in rows]
    shape = (len(rows), max(lengths), positives[rows[0]].shape[-1])
    positive = positives[rows[0]].new_zeros(shape)
    negative = torch.zeros_like(positive)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        positive[index, :length] = positives[row][:length]
        negative[index, :length] = negatives[row][:length]
    counts = torch.tensor(lengths, device=positive.device)
    return positive, negative, torch.arange(max(lengths), device=positive.device) < counts[:, None]
