"""ARGRE's reward head and its test-time refinement of the hidden state before `lm_head`.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). For a row h of width d, with `r(h) = w2 . relu(W1 h + b1) + b2`:

    gap = positive_reward - r(h);  if gap > 0:  h <- h + direction_scale * gap * direction
    `iterations` times:                         h <- h + eta * grad r(h)
    where grad r(h) = W1^T (1[W1 h + b1 > 0] * w2)

The gradient is each row's own. (The authors' code takes a mean over edited positions, which makes
eta depend on the batch.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RewardHead:
    """A two-layer reward model over hidden states of width d, with m hidden units."""

    w1: Tensor  # (m, d) float32
    b1: Tensor  # (m,) float32
    w2: Tensor  # (m,) float32
    b2: Tensor  # () float32
    direction: Tensor  # (d,) float32; its length is part of the method
    positive_reward: Tensor  # () float32, mean reward of the training positives

    def to(self, device: torch.device) -> "RewardHead":
        """The same head on another device."""
        return RewardHead(
            w1=self.w1.to(device),
            b1=self.b1.to(device),
            w2=self.w2.to(device),
            b2=self.b2.to(device),
            direction=self.direction.to(device),
            positive_reward=self.positive_reward.to(device),
        )


def reward(head: RewardHead, h: Tensor) -> Tensor:
    """The reward of each row: (n, d) float32 -> (n,) float32."""
    return torch.relu(h @ head.w1.T + head.b1) @ head.w2 + head.b2


def apply_reward(
    h: Tensor,
    head: RewardHead,
    eta: Tensor,
    iterations: Tensor,
    direction_scale: Tensor,
    max_iterations: int,
) -> Tensor:
    """Refine n rows by one head, each row with its own settings.

    Args:
        h: (n, d) float32.
        head: the head that all rows use.
        eta: (n, 1) float32, the step size.
        iterations: (n, 1) int64, gradient steps of each row.
        direction_scale: (n, 1) float32.
        max_iterations: the largest of `iterations`, known on the host so that no step waits for
            the device.

    Returns:
        (n, d) float32.
    """
    gap = (head.positive_reward - reward(head, h))[:, None]
    # A reward that is not a number must show, and not leave the row as it is.
    stays = (gap <= 0) | (direction_scale == 0)
    h = torch.where(stays, h, h + direction_scale * gap * head.direction)
    for step in range(max_iterations):
        active_units = (h @ head.w1.T + head.b1 > 0).to(h.dtype)
        gradient = (active_units * head.w2) @ head.w1
        h = torch.where(iterations > step, h + eta * gradient, h)
    return h
