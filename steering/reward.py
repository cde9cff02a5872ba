"""ARGRE's reward head and its test-time refinement of the hidden state before `lm_head`.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). For a row h of width d, with `r(h) = w2 . relu(W1 h + b1) + b2`:

    gap = positive_reward - r(h);  if gap > 0:  h <- h + direction_scale * gap * direction
    `iterations` times:                         h <- h + eta * grad r(h)
    where grad r(h) = W1^T (1[W1 h + b1 > 0] * w2)

The gradient is each row's own. (The authors' code takes a mean over edited positions, which makes
eta depend on the batch.)
"""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

_PACKED_FROM: Final = 4  # rows; fewer are as fast on weights as they are, read in two parts


@dataclass(frozen=True, slots=True, eq=False)
class RewardHead:
    """A two-layer reward model over hidden states of width d, with m hidden units."""

    w1: Tensor  # (m, d) float32
    b1: Tensor  # (m,) float32
    w2: Tensor  # (m,) float32
    b2: Tensor  # () float32
    direction: Tensor  # (d,) float32; its length is part of the method
    positive_reward: Tensor  # () float32, mean reward of the training positives
    # W1 and its transpose, laid out as oneDNN reads them, where `to` has found that worth it.
    packed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> "RewardHead":
        """The same head on a device, ready to be applied to many rows."""
        w1 = self.w1.to(device)
        return RewardHead(
            w1=w1,
            b1=self.b1.to(device),
            w2=self.w2.to(device),
            b2=self.b2.to(device),
            direction=self.direction.to(device),
            positive_reward=self.positive_reward.to(device),
            packed=_pack(w1) if device.type == "cpu" else None,
        )

    def units(self, h: Tensor) -> Tensor:
        """W1 h + b1 of each row, before the ReLU: (..., d) -> (..., m) float32."""
        if self.packed is None:
            return linear(h, self.w1, self.b1)
        if len(h) < _PACKED_FROM:
            parts = torch.bmm(self._parts, h.T.expand(len(self._parts), *h.T.shape))
            return parts.flatten(0, 1).T + self.b1
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            h, self.packed[0], self.b1, "none", [], ""
        )
        return output

    def back(self, weights: Tensor) -> Tensor:
        """W1^T times each row: (n, m) -> (n, d) float32."""
        if self.packed is None:
            return weights @ self.w1
        if len(weights) < _PACKED_FROM:
            halves = weights.view(len(weights), *self._parts.shape[:2]).transpose(0, 1)
            return torch.bmm(halves, self._parts).sum(0)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            weights, self.packed[1], None, "none", [], ""
        )
        return output

    @property
    def _parts(self) -> Tensor:
        """W1 in two: (2, m / 2, d), or (1, m, d) where m is odd.

        A batch of matrices is read at the memory's speed, a single one at a third of it.
        """
        m, d = self.w1.shape
        return self.w1.view(1 if m % 2 else 2, -1, d)


def _pack(w1: Tensor) -> tuple[Tensor, Tensor] | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return reorder(w1), reorder(w1.T.contiguous())


def reward(head: RewardHead, h: Tensor) -> Tensor:
    """The reward of each row: (n, d) float32 -> (n,) float32."""
    return torch.relu(head.units(h)) @ head.w2 + head.b2


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
        gradient = head.back((head.units(h) > 0) * head.w2)
        h = torch.addcmul(h, torch.where(iterations > step, eta, 0.0), gradient)
    return h
