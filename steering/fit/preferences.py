"""The interpolated preference pairs and the loss that ARGRE learns from.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). With `h+`, `h-` the hidden states before the head (after the final norm) of a
pair's positive and negative text, and `unit` the direction of `steering.fit.directions`, scaled to
length 1:

    h(alpha) = h+ + alpha ((h- - h+) . unit) unit,  alpha in linspace(0, 1, interpolations + 2)

over the token positions that both texts have. Of two neighbouring points on this path, `chosen` is
the one nearer to h+. With r summed over tokens (and r_bar its mean over tokens) the loss is

    -log sigmoid(beta (r(chosen) - r(rejected))) + center mean((r_bar(chosen) + r_bar(rejected))^2)

A neutral text is a positive without a negative. Its negative is the text itself, moved against
`unit` by the distance that lies between the pairs' positives and negatives in the mean. This makes
the text's mean reward like other positives', but requests close the gap of each token. So a term
may be added, the mean over neutral tokens of max(0, r_plus - r)^2, where r_plus is the mean reward
of the batch's positives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from steering.fit.hidden_states import TextStates
from steering.reward import RewardHead


@dataclass(frozen=True, slots=True, eq=False)
class Preferences:
    """Pairs to learn from: some of all pairs, then some of the neutral texts. Reads on demand."""

    positives: TextStates
    negatives: TextStates
    rows: list[int]  # indices into positives and negatives
    neutral: TextStates
    neutral_rows: list[int]  # indices into neutral
    shift: Tensor  # (width,) float32, from a neutral text's negative to the text

    def __len__(self) -> int:
        """Return the number of pairs, neutral texts included."""
        return len(self.rows) + len(self.neutral_rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read a pair's positive and negative, each (tokens, width) float32."""
        if not self.is_neutral(index):
            row = self.rows[index]
            return self.positives[row], self.negatives[row]
        text = self.neutral[self.neutral_rows[index - len(self.rows)]]
        return text, text - self.shift

    def is_neutral(self, index: int) -> bool:
        """Return whether a pair is a neutral text's."""
        return index >= len(self.rows)

    def without_neutral(self) -> "Preferences":
        """Return the pairs alone."""
        return replace(self, neutral_rows=[])

    def each_positive(self) -> Iterator[Tensor]:
        """Read the pairs' positives, each (tokens, width) float32; neutral texts are left out."""
        return (self.positives[row] for row in self.rows)

    def each_negative(self) -> Iterator[Tensor]:
        """Read the pairs' negatives, likewise."""
        return (self.negatives[row] for row in self.rows)

    def each_neutral(self) -> Iterator[Tensor]:
        """Read the neutral texts, likewise."""
        return (self.neutral[row] for row in self.neutral_rows)


def path_rewards(
    head: RewardHead, positive: Tensor, negative: Tensor, unit: Tensor, interpolations: int
) -> Tensor:
    """Return the rewards on the path h(alpha) of the module's docstring, differentiably.

    On the path the head's units are W1 h+ + b1 + alpha ((h- - h+) . unit) W1 unit: one product
    with W1 serves all points.

    Args:
        head: the reward head.
        positive: (..., width) float32.
        negative: the same shape.
        unit: (width,) float32, of length 1.
        interpolations: number of points between the two ends.

    Returns:
        (interpolations + 2, ...) float32, beginning with the positive's rewards.
    """
    along = (negative - positive) @ unit
    alphas = torch.linspace(0, 1, interpolations + 2, device=positive.device)
    distances = alphas.view(-1, *([1] * along.dim())) * along
    units = functional.linear(positive, head.w1, head.b1) + distances[..., None] * (head.w1 @ unit)
    return torch.relu(units) @ head.w2 + head.b2


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
    return _loss(sums[:-1], sums[1:], means[:-1] + means[1:], beta, center).mean()


def pair_loss(positive: Tensor, negative: Tensor, beta: float, center: float) -> Tensor:
    """Return the module's loss of a pair's two ends, over all tokens of each text.

    Args:
        positive: (tokens,) float32, rewards of the positive's tokens.
        negative: (tokens of the negative,) float32.
        beta: scale of the preference.
        center: weight of the term that keeps rewards around 0.

    Returns:
        () float32.
    """
    means = positive.mean() + negative.mean()
    return _loss(positive.sum(), negative.sum(), means, beta, center)


def shortfall(positives: Tensor, mask: Tensor, neutral: Tensor) -> Tensor:
    """Return the module's term for neutral texts; 0 if the batch has none.

    Args:
        positives: (pairs, tokens) float32, rewards of the positives.
        mask: (pairs, tokens) bool, True for a positive's tokens; at least one is.
        neutral: (pairs,) bool, True for positives that are neutral texts.

    Returns:
        () float32. The positives' mean reward is a constant to its gradient.
    """
    gaps = torch.relu(positives[mask].mean().detach() - positives).square()
    counted = mask & neutral[:, None]
    return (gaps * counted).sum() / counted.sum().clamp(min=1)


def _loss(chosen: Tensor, rejected: Tensor, means: Tensor, beta: float, center: float) -> Tensor:
    """Return each comparison's loss from sums of rewards, and the sum of both means."""
    return center * means.square() - functional.logsigmoid(beta * (chosen - rejected))


def common_tokens(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token positions that both texts of each pair have, as one batch.

    Args:
        pairs: a (tokens, width) float32 tensor for each pair's positive and negative; at least one
            pair.

    Returns:
        Positives and negatives, (pairs, tokens, width) float32 each, with zeros for padding; and
        the mask, (pairs, tokens) bool.
    """
    lengths = [min(len(positive), len(negative)) for positive, negative in pairs]
    first = pairs[0][0]
    positives = first.new_zeros(len(pairs), max(lengths), first.shape[-1])
    negatives = torch.zeros_like(positives)
    for index, ((positive, negative), length) in enumerate(zip(pairs, lengths, strict=True)):
        positives[index, :length] = positive[:length]
        negatives[index, :length] = negative[:length]
    counts = torch.tensor(lengths, device=first.device)
    return positives, negatives, torch.arange(max(lengths), device=first.device) < counts[:, None]
