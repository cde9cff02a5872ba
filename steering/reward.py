"""ARGRE's reward head, and the refinement of hidden states before `lm_head` with it.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). For a row h of width d, with `r(h) = w2 . relu(W1 h + b1) + b2`:

    gap = positive_reward - r(h);  if gap > 0:  h <- h + direction_scale * gap * direction
    `iterations` times:                         h <- h + eta * grad r(h)
    where grad r(h) = W1^T (1[W1 h + b1 > 0] * w2)

Each row follows its own gradient. The authors' code takes the mean over the edited positions
instead, which makes the effect of eta depend on the batch.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from steering.prepared_head import PreparedHead, apply_prepared, prepare


@dataclass(frozen=True, slots=True, eq=False)
class RewardHead:
    """A two-layer reward model over hidden states of width d, with m hidden units."""

    w1: Tensor  # (m, d) float32
    b1: Tensor  # (m,) float32
    w2: Tensor  # (m,) float32
    b2: Tensor  # () float32
    direction: Tensor  # (d,) float32; its length is part of the method
    positive_reward: Tensor  # () float32, mean reward of the training positives
    # The faster forms of `apply_reward` read this layout. None before `prepare`, and for heads that
    # `prepared_head.prepare` refuses.
    prepared: PreparedHead | None = field(default=None, repr=False, kw_only=True)

    def to(self, device: torch.device) -> "RewardHead":
        """Return the head on a device, without `prepared` if it has to be copied."""
        if self.w1.device == device:
            return self
        tensors = (self.w1, self.b1, self.w2, self.b2, self.direction, self.positive_reward)
        return RewardHead(*(each.to(device) for each in tensors))

    def prepare(self) -> "RewardHead":
        """Return the head with `prepared` filled in, unless `prepared_head.prepare` refuses it."""
        if self.prepared is not None:
            return self
        target = self.positive_reward - self.b2
        return replace(self, prepared=prepare(self.w1, self.b1, self.w2, target, self.direction))


def reward(head: RewardHead, h: Tensor) -> Tensor:
    """Return each row's reward: (n, d) float32 -> (n,) float32."""
    return torch.relu(linear(h, head.w1, head.b1)) @ head.w2 + head.b2


def apply_reward(
    h: Tensor,
    head: RewardHead,
    direction_scale: Tensor,
    step_sizes: Tensor,
) -> Tensor:
    """Refine n rows by one head, each row with its own settings, by the module's equations.

    Args:
        h: (n, d) float32.
        head: the head that all rows use.
        direction_scale: (n, 1) float32.
        step_sizes: (n, most iterations) float32, a row's eta for each of its iterations, then 0.

    Returns:
        (n, d) float32.
    """
    gap = (head.positive_reward - reward(head, h))[:, None]
    # A NaN gap compares false here, so that the row becomes NaN instead of passing unsteered.
    stays = (gap <= 0) | (direction_scale == 0)
    h = torch.where(stays, h, h + direction_scale * gap * head.direction)
    for eta in torch.unbind(step_sizes[:, :, None], dim=1):
        units = linear(h, head.w1, head.b1)
        # 1[units > 0] * w2, but a NaN unit keeps its slope (NaN <= 0 is false), and is not hidden.
        slopes = torch.ops.aten.threshold_backward(head.w2.expand_as(units), units, 0)
        gradient = slopes @ head.w1
        # A finished row has eta 0. Its gradient may be infinite, and 0 * inf is NaN: hence `where`.
        h = torch.where(eta == 0, h, torch.addcmul(h, eta, gradient))
    return h


def refine(h: Tensor, head: RewardHead, direction_scale: Tensor, step_sizes: Tensor) -> Tensor:
    """Refine n rows by one head: `apply_reward`, in its faster form if a CPU has it prepared.

    A row's bits do not depend on the numbers and settings of the other rows.

    Args and returned tensor are those of `apply_reward`.
    """
    # On a GPU the faster form would have to wait for the device in each step.
    if head.prepared is None or h.device.type != "cpu":
        return apply_reward(h, head, direction_scale, step_sizes)
    return apply_prepared(h, head.prepared, direction_scale, step_sizes)
