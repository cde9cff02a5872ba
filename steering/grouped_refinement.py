"""Rows of many reward heads refined on a GPU in five launches, however many heads and steps."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from steering.prepared_head import PreparedHead

TILE_ROWS: Final = 4
_FIELDS: Final = 9  # of a head
_ALIGNMENT: Final = 16  # bytes
_FEWEST_UNITS: Final = 64  # that there is room for: what heads are padded to


class RowHeads(NamedTuple):
    """What tells kernels the head of each of n rows; all on their device."""

    table: Tensor  # (slots, 9) int64, `PreparedHead.fields`; zeros where a slot has no head
    slots: Tensor  # (n,) int32
    counts: Tensor  # (n,) int32, the rows of the tile that a row begins; 0 if it begins none


class RefinementKernels(Protocol):
    """The launches; all tensors that are not said to be else are float32."""

    def units(self, h: Tensor, heads: RowHeads, most_units: int) -> Tensor:
        """Give W1 h + b1: (n, width) -> (n, most_units)."""

    def move(
        self, units: Tensor, heads: RowHeads, direction_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move units, in place, as the directional step does; (n, units) and (n, 1).

        Returns:
            (n, units), the slopes 1[u > 0] * w2; and (n, 1), by how many directions a row moves.
        """

    def motion(self, slopes: Tensor, heads: RowHeads) -> Tensor:
        """Give parts of W1 W1^T slopes: (n, units) -> (n, parts, units)."""

    def climb(self, units: Tensor, motion: Tensor, heads: RowHeads, step_sizes: Tensor) -> Tensor:
        """Give the sum over all steps of eta times slopes, as units move: (n, units)."""

    def finish(self, h: Tensor, shifts: Tensor, climbed: Tensor, heads: RowHeads) -> Tensor:
        """Give h + shifts * direction + W1^T climbed: (n, width)."""


class GroupedRefinement:
    """`apply_reward` for the rows of several heads, in slots, on one device.

    The host waits for nothing. What is launched depends on the number of rows and of steps and on
    `most_units`; only rows that are known to have one head are multiplied by torch.

    How a row is computed depends on its own head, on `most_units`, and on whether rows are
    multiplied by torch; so do its bits, and there on the number of rows.
    """

    def __init__(self, slots: int, device: torch.device, kernels: RefinementKernels) -> None:
        """Have no heads.

        Args:
            slots: of all heads there may be, and of no head.
            kernels: what computes on the device.
        """
        self._table = torch.zeros(slots, _FIELDS, dtype=torch.int64, device=device)
        self._heads: dict[int, PreparedHead] = {}
        self._kernels = kernels
        self.most_units = _FEWEST_UNITS  # of any head there was, and up to the next power of two

    # Whatever mode the caller is in: what was made in another could not be changed.
    @torch.inference_mode()
    def put(self, slot: int, head: PreparedHead | None) -> None:
        """Fill a slot, or empty it.

        What was launched before finds what the slot held, whose memory torch gives to nobody who
        does not come later; so all that happens on one stream.

        Args:
            head: on the device.
        """
        fields: tuple[int, ...] = (0,) * _FIELDS
        if head is not None:
            fields = head.fields
            assert head.w1.device == self._table.device, "addresses know no device"
            assert not any(each % _ALIGNMENT for each in fields), "kernels read 16 bytes at once"
        row = torch.tensor(fields, dtype=torch.int64)
        if self._table.is_cuda:
            row = row.pin_memory()
        self._table[slot].copy_(row, non_blocking=True)
        if head is None:
            self._heads.pop(slot, None)
            return
        self._heads[slot] = head
        while self.most_units < len(head.b1):
            self.most_units *= 2

    def holds(self, slots: Iterable[int]) -> bool:
        """Whether all of some slots have heads."""
        return self._heads.keys() >= set(slots)

    def __call__(
        self,
        h: Tensor,
        heads: Sequence[tuple[int, int]] | None,
        slots: Tensor,
        counts: Tensor,
        direction_scale: Tensor,
        step_sizes: Tensor,
    ) -> Tensor:
        """Refine n rows; see `apply_reward`.

        Rows whose slots have no head, and whose counts are 0, are left as they are.

        Args:
            h: (n, d) float32; the rows of one head lie side by side.
            heads: each head's slot, and how many rows it has; None where that is not known, as in
                a graph that is replayed for others.
            slots: (n,) int32, each row's.
            counts: (n,) int32, as `tiles` gives them.
            direction_scale, step_sizes: (n, 1) and (n, most iterations) float32.

        Returns:
            (n, d) float32.
        """
        assert h.dtype == torch.float32, "addresses know no dtype"
        own = RowHeads(self._table, slots, counts)
        # Kernels launch on the current device.
        with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
            if heads is not None and len(heads) == 1 and len(h) > TILE_ROWS:
                [(slot, _)] = heads
                return self._refine_alike(h, self._heads[slot], own, direction_scale, step_sizes)
            return self._refine(h.contiguous(), own, direction_scale, step_sizes)

    def _refine(
        self, h: Tensor, heads: RowHeads, direction_scale: Tensor, step_sizes: Tensor
    ) -> Tensor:
        units = self._kernels.units(h, heads, self.most_units)
        slopes, shifts = self._kernels.move(units, heads, direction_scale)
        if step_sizes.shape[1]:
            motion = self._kernels.motion(slopes, heads)
            climbed = self._kernels.climb(units, motion, heads, step_sizes)
        else:
            climbed = torch.zeros_like(units)
        return self._kernels.finish(h, shifts, climbed, heads)

    def _refine_alike(
        self,
        h: Tensor,
        head: PreparedHead,
        heads: RowHeads,
        direction_scale: Tensor,
        step_sizes: Tensor,
    ) -> Tensor:
        """Refine rows of one head: each matrix is multiplied by all of them."""
        width = h.shape[1]
        w1 = head.w1[:, :width]
        units = linear(h, w1, head.b1)
        slopes, shifts = self._kernels.move(units, heads, direction_scale)
        change = shifts * head.direction[:width]
        if step_sizes.shape[1]:
            motion = (slopes @ head.gram)[:, None]
            change = change.addmm(self._kernels.climb(units, motion, heads, step_sizes), w1)
        # To add 0 would change the sign of a zero.
        return torch.where(change == 0, h, h + change)


def tiles(heads: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Divide rows into tiles of one head each, of at most TILE_ROWS.

    Args:
        heads: each head's slot, and how many rows it has, after those of the head before it.

    Returns:
        Of each row, its slot, and the rows of the tile that it begins: 0 if it begins none.
    """
    slots: list[int] = []
    counts: list[int] = []
    for slot, rows in heads:
        slots += [slot] * rows
        for first in range(0, rows, TILE_ROWS):
            count = min(TILE_ROWS, rows - first)
            counts += [count] + [0] * (count - 1)
    return slots, counts
