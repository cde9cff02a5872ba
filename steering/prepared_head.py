"""Lays out a reward head's parameters for `refine.cpp` and for the kernels on a GPU."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

# The same as in refine.cpp: the width d is padded to a multiple of _LANES, m to one of _GROUP.
_LANES: Final = 16
_GROUP: Final = 64
_MOST_UNITS: Final = 2048  # limit for a prepared head: W1 W1^T has m * m numbers


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHead:
    """A head in float32, contiguous, and padded with zeros, which do not change its results."""

    w1: Tensor  # (m, d)
    gram: Tensor  # (m, m), W1 W1^T
    b1: Tensor  # (m,)
    w2: Tensor  # (m,)
    direction: Tensor  # (d,)
    along: Tensor  # (m,), W1 direction
    wanted: Tensor  # (1,), positive_reward - b2: the gap is wanted - w2 . relu(W1 h + b1)

    @property
    def width(self) -> int:
        """d, padded."""
        return len(self.direction)

    @property
    def fields(self) -> tuple[int, ...]:
        """The fields of `Head` in refine.cpp without `rows`: the tensors' addresses, m and d."""
        tensors = (
            *(self.w1, self.gram, self.b1, self.w2),
            *(self.direction, self.along, self.wanted),
        )
        return (*(tensor.data_ptr() for tensor in tensors), len(self.b1), self.width)


def prepare(
    w1: Tensor, b1: Tensor, w2: Tensor, wanted: Tensor, direction: Tensor
) -> PreparedHead | None:
    """Lay out a head's parameters, all float32.

    Returns None, so that the caller keeps to the plain equations, for a head with too many units to
    keep W1 W1^T, and for one whose W1 W1^T or W1 direction overflows.

    Args:
        w1: (m, d); b1, w2: (m,); direction: (d,).
        wanted: (), the mean reward of the training positives minus the head's b2.
    """
    units, width = w1.shape
    if units > _MOST_UNITS:
        return None
    more_units, wider = -units % _GROUP, -width % _LANES
    if wider or more_units:
        w1, direction = pad(w1, (0, wider, 0, more_units)), pad(direction, (0, wider))
        b1, w2 = pad(b1, (0, more_units)), pad(w2, (0, more_units))
    gram, along = w1 @ w1.T, w1 @ direction
    if not (gram.isfinite().all() and along.isfinite().all()):
        return None
    tensors = [each.contiguous() for each in (w1, gram, b1, w2, direction, along, wanted[None])]
    assert all(each.dtype == torch.float32 for each in tensors), "addresses know no dtype"
    return PreparedHead(*tensors)
