"""Applies a reward head to rows of hidden states, with three products by W1 in all.

`steering/reward.py` has the equations and their names.

A step along the gradient g changes a row h by eta g, and its units u = W1 h + b1 by eta W1 g.
Between two steps few units pass zero (5 of 1024 in a trained head). A unit that becomes positive
adds w2 times its line of W1 to g, and w2 times its line of W1 W1^T to W1 g; a unit that stops being
positive subtracts the same. `apply_prepared` does this on
a CPU, `GroupedRefinement` on a GPU.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, pad

# The kernels on a GPU want the width d to be a multiple of _LANES, and the number m of units to be
# one of _GROUP.
_LANES: Final = 16
_GROUP: Final = 64
_MAX_UNITS: Final = 2048  # limit for a prepared head: W1 W1^T has m * m numbers


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHead:
    """A head in float32, contiguous, and padded with zeros, which do not change its results."""

    w1: Tensor  # (m, d)
    gram: Tensor  # (m, m), W1 W1^T
    b1: Tensor  # (m,)
    w2: Tensor  # (m,)
    direction: Tensor  # (d,)
    w1_direction: Tensor  # (m,), W1 direction
    target: Tensor  # (1,), positive_reward - b2: the gap is target - w2 . relu(W1 h + b1)

    @property
    def width(self) -> int:
        """d, padded."""
        return len(self.direction)

    @property
    def table_row(self) -> tuple[int, ...]:
        """The head's row in the GPU kernels' table: tensors' addresses, then m and d, padded."""
        tensors = (
            *(self.w1, self.gram, self.b1, self.w2),
            *(self.direction, self.w1_direction, self.target),
        )
        return (*(tensor.data_ptr() for tensor in tensors), len(self.b1), self.width)


def prepare(
    w1: Tensor, b1: Tensor, w2: Tensor, target: Tensor, direction: Tensor
) -> PreparedHead | None:
    """Lay out a head's parameters, all float32.

    Returns None, so that the caller keeps to the plain equations, for a head with too many units to
    keep W1 W1^T, and for one whose W1 W1^T or W1 direction overflows.

    Args:
        w1: (m, d); b1, w2: (m,); direction: (d,).
        target: (), the mean reward of the training positives minus the head's b2.
    """
    units, width = w1.shape
    if units > _MAX_UNITS:
        return None
    more_units, wider = -units % _GROUP, -width % _LANES
    if wider or more_units:
        w1, direction = pad(w1, (0, wider, 0, more_units)), pad(direction, (0, wider))
        b1, w2 = pad(b1, (0, more_units)), pad(w2, (0, more_units))
    gram, w1_direction = w1 @ w1.T, w1 @ direction
    if not (gram.isfinite().all() and w1_direction.isfinite().all()):
        return None
    tensors = [
        each.contiguous() for each in (w1, gram, b1, w2, direction, w1_direction, target[None])
    ]
    assert all(each.dtype == torch.float32 for each in tensors), "addresses know no dtype"
    return PreparedHead(*tensors)


def apply_prepared(
    h: Tensor, head: PreparedHead, direction_scale: Tensor, step_sizes: Tensor
) -> Tensor:
    """Do what `apply_reward` does, with fewer products.

    The bits of a resulting row depend on the head, the row, its settings and n only.

    Args:
        h: (n, d) float32.
        head: the head that all rows use.
        direction_scale: (n, 1) float32.
        step_sizes: (n, most iterations) float32, a row's eta for each of its iterations, then 0.

    Returns:
        (n, d) float32.
    """
    width = h.shape[1]
    h = pad(h, (0, head.width - width))
    units = linear(h, head.w1, head.b1)
    gap = head.target - (torch.relu(units) @ head.w2)[:, None]
    # A NaN gap compares false here, so that the row becomes NaN instead of passing unsteered.
    stays = (gap <= 0) | (direction_scale == 0)
    shift = direction_scale * gap
    h = torch.where(stays, h, h + shift * head.direction)
    units = torch.where(stays, units, units + shift * head.w1_direction)
    slopes = _slopes(units, head.w2)
    gradient = slopes @ head.w1
    gram_slopes = linear(gradient, head.w1)
    for step, eta in enumerate(torch.unbind(step_sizes[:, :, None], dim=1)):
        if step:
            before, slopes = slopes, _slopes(units, head.w2)
            rows, flipped = (slopes != before).nonzero(as_tuple=True)
            changes = (slopes - before)[rows, flipped]
            starts = torch.searchsorted(rows, torch.arange(len(h)))
            # `embedding_bag` adds each row's weighted lines of the table in their order.
            gradient += embedding_bag(
                flipped, head.w1, starts, mode="sum", per_sample_weights=changes
            )
            gram_slopes += embedding_bag(
                flipped, head.gram, starts, mode="sum", per_sample_weights=changes
            )
        # A row whose iterations are over has eta 0. 0 times an infinite gradient is NaN: hence
        # `where`.
        h = torch.where(eta == 0, h, torch.addcmul(h, eta, gradient))
        units.addcmul_(eta, gram_slopes)
    return h[:, :width]


def _slopes(units: Tensor, w2: Tensor) -> Tensor:
    """Return w2 where a unit is above 0 or NaN, else 0, so that no NaN unit is hidden."""
    slopes: Tensor = torch.ops.aten.threshold_backward(w2.expand_as(units), units, 0)
    return slopes
