"""ARGRE's reward head and its test-time refinement of the hidden state before `lm_head`.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). For a row h of width d, with `r(h) = w2 . relu(W1 h + b1) + b2`:

    gap = positive_reward - r(h);  if gap > 0:  h <- h + direction_scale * gap * direction
    `iterations` times:                         h <- h + eta * grad r(h)
    where grad r(h) = W1^T (1[W1 h + b1 > 0] * w2)

The gradient is each row's own. (The authors' code takes a mean over edited positions, which makes
eta depend on the batch.)
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from steering.prepared_head import PreparedHead, prepare


@dataclass(frozen=True, slots=True, eq=False)
class RewardHead:
    """A two-layer reward model over hidden states of width d, with m hidden units."""

    w1: Tensor  # (m, d) float32
    b1: Tensor  # (m,) float32
    w2: Tensor  # (m,) float32
    b2: Tensor  # () float32
    direction: Tensor  # (d,) float32; its length is part of the method
    positive_reward: Tensor  # () float32, mean reward of the training positives
    # What `NativeRefinement` reads; None until `prepare`, and of a head that this does not suit.
    prepared: PreparedHead | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> "RewardHead":
        """The same head on a device."""
        if self.w1.device == device:
            return self
        w1, b1, w2, b2, direction, positive_reward = (
            tensor.to(device)
            for tensor in (
                *(self.w1, self.b1, self.w2, self.b2),
                *(self.direction, self.positive_reward),
            )
        )
        return RewardHead(w1, b1, w2, b2, direction, positive_reward)

    def prepare(self) -> "RewardHead":
        """The same head, on a CPU, laid out for `NativeRefinement` if this suits it."""
        if self.prepared is not None:
            return self
        wanted = self.positive_reward - self.b2
        return replace(self, prepared=prepare(self.w1, self.b1, self.w2, wanted, self.direction))


def reward(head: RewardHead, h: Tensor) -> Tensor:
    """The reward of each row: (n, d) float32 -> (n,) float32."""
    return torch.relu(linear(h, head.w1, head.b1)) @ head.w2 + head.b2


def apply_reward(
    h: Tensor,
    head: RewardHead,
    direction_scale: Tensor,
    step_sizes: Tensor,
) -> Tensor:
    """Refine n rows by one head, each row with its own settings, as the equations have it.

    Args:
        h: (n, d) float32.
        head: the head that all rows use.
        direction_scale: (n, 1) float32.
        step_sizes: (n, most iterations) float32: eta, and 0 from where on a row has done its own.

    Returns:
        (n, d) float32.
    """
    gap = (head.positive_reward - reward(head, h))[:, None]
    # A reward that is not a number must show, and not leave the row as it is.
    stays = (gap <= 0) | (direction_scale == 0)
    h = torch.where(stays, h, h + direction_scale * gap * head.direction)
    for eta in torch.unbind(step_sizes[:, :, None], dim=1):
        units = linear(h, head.w1, head.b1)
        # 1[units > 0] * w2; a unit that is not a number must show as well.
        slopes = torch.ops.aten.threshold_backward(head.w2.expand_as(units), units, 0)
        gradient = slopes @ head.w1
        # What a row that has done its own would be moved by may be infinite, and 0 times it NaN.
        h = torch.where(eta == 0, h, torch.addcmul(h, eta, gradient))
    return h
