"""ARGRE's reward head and its test-time refinement of the hidden state before `lm_head`.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025). For a row h of width d, with `r(h) = w2 . relu(W1 h + b1) + b2`:

    gap = positive_reward - r(h);  if gap > 0:  h <- h + direction_scale * gap * direction
    `iterations` times:                         h <- h + eta * grad r(h)
    where grad r(h) = W1^T (1[W1 h + b1 > 0] * w2)

The gradient is each row's own. (The authors' code takes a mean over edited positions, which makes
eta depend on the batch.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

_PACKED_FROM: Final = 4  # rows; fewer are as fast on weights as they are, read in two parts
_MOST_UNITS: Final = 2048  # of a head whose Gram matrix is kept: 16 MB


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a CPU computes refinements from, made once for each head."""

    packed: Tensor  # W1, laid out as oneDNN reads it
    packed_back: Tensor  # W1^T, the same
    gram: Tensor  # W1 W1^T: (m, m) float32
    direction_units: Tensor  # W1 direction: (m,) float32


@dataclass(frozen=True, slots=True, eq=False)
class RewardHead:
    """A two-layer reward model over hidden states of width d, with m hidden units."""

    w1: Tensor  # (m, d) float32
    b1: Tensor  # (m,) float32
    w2: Tensor  # (m,) float32
    b2: Tensor  # () float32
    direction: Tensor  # (d,) float32; its length is part of the method
    positive_reward: Tensor  # () float32, mean reward of the training positives
    prepared: Prepared | None = field(default=None, repr=False)  # where `to` finds it worth it

    def to(self, device: torch.device) -> "RewardHead":
        """The same head on a device, ready to be applied to many rows."""
        if self.prepared is not None and self.w1.device == device:
            return self
        w1, direction = self.w1.to(device), self.direction.to(device)
        return RewardHead(
            w1=w1,
            b1=self.b1.to(device),
            w2=self.w2.to(device),
            b2=self.b2.to(device),
            direction=direction,
            positive_reward=self.positive_reward.to(device),
            prepared=_prepare(w1, direction),
        )

    def units(self, h: Tensor) -> Tensor:
        """W1 h + b1 of each row, before the ReLU: (n, d) -> (n, m) float32."""
        return self._forth(h, self.b1)

    def slopes(self, units: Tensor) -> Tensor:
        """1[units > 0] * w2, the reward's derivative by them: (n, m) -> (n, m) float32."""
        slopes: Tensor = torch.ops.aten.threshold_backward(self.w2.expand_as(units), units, 0)
        return slopes

    def gradient(self, slopes: Tensor) -> Tensor:
        """W1^T slopes, the reward's derivative by h: (n, m) -> (n, d) float32."""
        if self.prepared is None:
            return slopes @ self.w1
        if len(slopes) >= _PACKED_FROM:
            return _packed_linear(slopes, self.prepared.packed_back, None)
        halves = _halves(self.w1)
        parts = slopes.view(len(slopes), *halves.shape[:2]).transpose(0, 1)
        return torch.bmm(parts, halves).sum(0)

    def change(self, gradient: Tensor) -> Tensor:
        """W1 gradient, by which a step along it moves the units: (n, d) -> (n, m) float32."""
        return self._forth(gradient, None)

    def _forth(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if self.prepared is None:
            return linear(rows, self.w1, bias)
        if len(rows) >= _PACKED_FROM:
            return _packed_linear(rows, self.prepared.packed, bias)
        halves = _halves(self.w1)
        parts = torch.bmm(halves, rows.T.expand(len(halves), *rows.T.shape))
        output = parts.flatten(0, 1).T
        return output if bias is None else output + bias


def _packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output


def _halves(w1: Tensor) -> Tensor:
    """(2, m / 2, d), or (1, m, d) where m is odd.

    A batch of matrices is read at the memory's speed, a single one at a third of it.
    """
    m, d = w1.shape
    return w1.view(1 if m % 2 else 2, -1, d)


def _prepare(w1: Tensor, direction: Tensor) -> Prepared | None:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if w1.device.type != "cpu" or len(w1) > _MOST_UNITS or not has_onednn:
        return None
    pack = torch.ops.mkldnn._reorder_linear_weight
    return Prepared(pack(w1), pack(w1.T.contiguous()), w1 @ w1.T, w1 @ direction)


def reward(head: RewardHead, h: Tensor) -> Tensor:
    """The reward of each row: (n, d) float32 -> (n,) float32."""
    return _reward(head, head.units(h))


def _reward(head: RewardHead, units: Tensor) -> Tensor:
    return torch.relu(units) @ head.w2 + head.b2


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
    units = head.units(h)
    gap = (head.positive_reward - _reward(head, units))[:, None]
    # A reward that is not a number must show, and not leave the row as it is.
    stays = (gap <= 0) | (direction_scale == 0)
    distance = direction_scale * gap
    h = torch.where(stays, h, h + distance * head.direction)
    if not max_iterations:
        return h
    steps = torch.arange(max_iterations, device=h.device)
    etas = torch.split(torch.where(iterations > steps, eta, 0.0), 1, dim=1)
    if head.prepared is None:
        for eta in etas:
            h = torch.addcmul(h, eta, head.gradient(head.slopes(head.units(h))))
        return h
    moved = units + distance * head.prepared.direction_units
    return _climb(h, torch.where(stays, units, moved), head, head.prepared.gram, etas)


def _climb(
    h: Tensor, units: Tensor, head: RewardHead, gram: Tensor, etas: Sequence[Tensor]
) -> Tensor:
    """Gradient ascent that multiplies by W1 once, and then for what changes only.

    From one step to the next, few units (5 of 1024 in a trained head) pass zero. Their rows of
    W1 and of W1 W1^T are all that the gradient, and what it does to the units, change by.
    """
    slopes = head.slopes(units)
    gradient = head.gradient(slopes)
    change = head.change(gradient)
    numbers = torch.arange(len(h))
    for step, eta in enumerate(etas, start=1):
        h = torch.addcmul(h, eta, gradient)
        if step == len(etas):
            break
        units = torch.addcmul(units, eta, change)
        before, slopes = slopes, head.slopes(units)
        difference = slopes - before
        rows, flipped = difference.nonzero(as_tuple=True)
        firsts = torch.searchsorted(rows, numbers)  # each row's, in `flipped`
        weights = difference[rows, flipped]
        gradient = gradient + _weighted_sum(head.w1, flipped, firsts, weights)
        change = change + _weighted_sum(gram, flipped, firsts, weights)
    return h


def _weighted_sum(matrix: Tensor, rows: Tensor, firsts: Tensor, weights: Tensor) -> Tensor:
    """Sums of a matrix's rows, times their weights; `firsts` says where each sum begins."""
    return embedding_bag(rows, matrix, firsts, mode="sum", per_sample_weights=weights)
