"""A reward head as a CPU applies it fastest, made once for each head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

_PACKED_FROM: Final = 4  # rows; fewer are as fast on weights as they are, read in two parts
_MOST_UNITS: Final = 2048  # of a head that is kept in all forms, which take 5 times its memory
_MULTIPLE: Final = 64  # of units: sums over them are then the same bits beside wider heads


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHead:
    """A head's parameters, W1 in several forms. All tensors are float32.

    Units are added that do nothing, up to a multiple of 64: m is then as many.
    """

    w1: Tensor  # (m, d)
    b1: Tensor  # (m,)
    w2: Tensor  # (m,)
    wanted: Tensor  # (1,), what w2 . relu(W1 h + b1) is where the gap is closed
    packed: Tensor | None  # W1, laid out as oneDNN reads it; None without oneDNN, or if too large
    packed_back: Tensor | None  # W1^T, the same
    # (m, d + m), [W1 | W1 W1^T]: what a unit's slope adds to the gradient, and to the change that
    # a step along the gradient makes to the units. Only W1 where that would be too large.
    rows: Tensor
    step: Tensor  # (d + m,), [direction | W1 direction]

    @property
    def units(self) -> int:
        """m."""
        return len(self.w1)

    @property
    def one_row(self) -> Mapping[str, Tensor]:
        """What `begin_one_row` takes of it."""
        return {
            "w1": self.w1,
            "b1": self.b1,
            "w2": self.w2,
            "wanted": self.wanted,
            "step": self.step,
        }

    def forth(self, rows: Tensor) -> Tensor:
        """W1 of each row: (n, d) -> (n, m)."""
        if self.packed is None:
            return rows @ self.w1.T
        if len(rows) >= _PACKED_FROM:
            return _packed_linear(rows, self.packed)
        halves = _halves(self.w1)
        columns = torch.bmm(halves, rows.T.expand(len(halves), *rows.T.shape))
        return columns.flatten(0, 1).T.contiguous()

    def back(self, slopes: Tensor) -> Tensor:
        """W1^T of each row: (n, m) -> (n, d)."""
        if self.packed_back is None:
            return slopes @ self.w1
        if len(slopes) >= _PACKED_FROM:
            return _packed_linear(slopes, self.packed_back)
        halves = _halves(self.w1)
        parts = slopes.reshape(len(slopes), *halves.shape[:2]).transpose(0, 1)
        return torch.bmm(parts, halves).sum(0)

    def along(self, slopes: Tensor) -> Tensor:
        """The gradient of each row, and its change of the units: (n, m or more) -> (n, d + m)."""
        gradient = self.back(slopes[:, : self.units])
        return torch.cat((gradient, self.forth(gradient)), dim=1)

    def along_few(self, units: Tensor, firsts: Tensor, slopes: Tensor) -> Tensor:
        """The same, of rows in which few slopes are not zero.

        Args:
            units: (k,) int64, of which units; those of the first row, then of the second.
            firsts: (n,) int64, where each row's begin.
            slopes: (k,) float32, what theirs are.
        """
        sums: Tensor = torch.embedding_bag(
            self.rows, units, firsts, mode=0, per_sample_weights=slopes
        )[0]
        if sums.shape[1] == len(self.step):
            return sums
        return torch.cat((sums, self.forth(sums)), dim=1)


def prepare(w1: Tensor, b1: Tensor, w2: Tensor, wanted: Tensor, direction: Tensor) -> PreparedHead:
    """Of a head's parameters on the CPU, all float32.

    Args:
        w1: (m, d); b1, w2: (m,); direction: (d,).
        wanted: (), the mean reward of the training positives without the head's last bias.
    """
    added = -len(w1) % _MULTIPLE
    w1, b1, w2 = pad(w1, (0, 0, 0, added)).contiguous(), pad(b1, (0, added)), pad(w2, (0, added))
    small = len(w1) <= _MOST_UNITS
    packs = small and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    pack = torch.ops.mkldnn._reorder_linear_weight
    return PreparedHead(
        w1=w1,
        b1=b1,
        w2=w2,
        wanted=wanted[None],
        packed=pack(w1) if packs else None,
        packed_back=pack(w1.T.contiguous()) if packs else None,
        rows=torch.cat((w1, w1 @ w1.T), dim=1) if small else w1,
        step=torch.cat((direction, w1 @ direction)),
    )


def _packed_linear(rows: Tensor, packed: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return output


def _halves(w1: Tensor) -> Tensor:
    """(2, m / 2, d).

    A batch of matrices is read at the memory's speed, a single one at a third of it.
    """
    return w1.view(2, -1, w1.shape[1])
