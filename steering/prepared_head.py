"""A reward head's parameters as `refine.cpp` reads them, laid out once for each head."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

# As in refine.cpp.
_LANES: Final = 16
_GROUP: Final = 64
_MOST_UNITS: Final = 2048  # of a head whose W1 W1^T is kept


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHead:
    """All tensors are float32 and contiguous, padded with zeros, which do nothing."""

    w1: Tensor  # (m, d)
    gram: Tensor  # (m, m), W1 W1^T
    b1: Tensor  # (m,)
    w2: Tensor  # (m,)
    direction: Tensor  # (d,)
    along: Tensor  # (m,), W1 direction
    wanted: Tensor  # (1,), what w2 . relu(W1 h + b1) is where the gap is closed

    @property
    def width(self) -> int:
        """d, padded."""
        return len(self.direction)

    @property
    def fields(self) -> tuple[int, ...]:
        """Those of `Head` in refine.cpp, but for the rows: addresses, m and d."""
        tensors = (
            *(self.w1, self.gram, self.b1, self.w2),
            *(self.direction, self.along, self.wanted),
        )
        return (*(tensor.data_ptr() for tensor in tensors), len(self.b1), self.width)


def prepare(
    w1: Tensor, b1: Tensor, w2: Tensor, wanted: Tensor, direction: Tensor
) -> PreparedHead | None:
    """Of a head's parameters on the CPU, all float32.

    None of a head that has too many units for W1 W1^T to be kept, or such large weights that it
    overflows, which the equations need not.

    Args:
        w1: (m, d); b1, w2: (m,); direction: (d,).
        wanted: (), the mean reward of the training positives without the head's last bias.
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
