"""Refines rows of many reward heads on a GPU, in five launches however many heads and steps."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from steering.prepared_head import PreparedHead

TILE_ROWS: Final = 4  # the most rows of one head that share each read of its matrices
_FIELDS: Final = 9  # the length of `PreparedHead.table_row`
_ALIGNMENT: Final = 16  # of a head's tensors (bytes) and sizes (numbers)
_MIN_UNITS: Final = 64  # the initial `max_units`; heads are padded to multiples of it


class HeadLookup(NamedTuple):
    """The head of each of n rows, in the form that kernels read, on their device."""

    table: Tensor  # (slots, 9) int64, `PreparedHead.table_row`; zeros in slots without a head
    slots: Tensor  # (n,) int32
    tile_sizes: Tensor  # (n,) int32, the size of the tile that a row begins, or 0; see `tiles`


class RefinementKernels(Protocol):
    """The five kernel launches of a refinement. All tensors outside `HeadLookup` are float32."""

    def units(self, h: Tensor, heads: HeadLookup, max_units: int) -> Tensor:
        """Return the units u = W1 h + b1: (n, width) -> (n, max_units)."""

    def directional_step(
        self, units: Tensor, heads: HeadLookup, direction_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the directional step to the units, in place.

        Args:
            units: (n, units).
            heads: the rows' heads.
            direction_scale: (n, 1).

        Returns:
            (n, units), the slopes 1[u > 0] * w2 after the step; and (n, 1), the shifts, i.e. each
            row's multiple of its head's direction.
        """

    def gram_slopes(self, slopes: Tensor, heads: HeadLookup) -> Tensor:
        """Return W1 W1^T slopes as partial sums: (n, units) -> (n, parts, units)."""

    def ascend(
        self, units: Tensor, gram_slopes: Tensor, heads: HeadLookup, step_sizes: Tensor
    ) -> Tensor:
        """Follow the units through all steps; return the sum of eta * slopes: (n, units)."""

    def finish(self, h: Tensor, shifts: Tensor, slope_sums: Tensor, heads: HeadLookup) -> Tensor:
        """Return h + shifts * direction + W1^T slope_sums: (n, width)."""


class GroupedRefinement:
    """Does what `apply_reward` does, on one device, for rows of several heads kept in slots.

    The host never waits for the device. The launches depend only on the numbers of rows and steps
    and on `max_units`, so that a CUDA graph can hold them. The exception: more than TILE_ROWS rows
    that are known to share one head are multiplied by its matrices with torch's own products.

    A row's bits depend on its own head, on `max_units`, and on whether torch multiplies the rows;
    if it does, also on the number of rows.
    """

    def __init__(self, slots: int, device: torch.device, kernels: RefinementKernels) -> None:
        """Start without heads.

        Args:
            slots: number of slots, slot 0 (the identity) included.
            device: the device of the heads and the rows.
            kernels: the launches for this device.
        """
        self._table = torch.zeros(slots, _FIELDS, dtype=torch.int64, device=device)
        self._heads: dict[int, PreparedHead] = {}
        self._kernels = kernels
        self.max_units = _MIN_UNITS  # a power of two, not below the units of any head ever put

    # Always in inference mode: if the table was made in it, it can be changed in no other mode.
    @torch.inference_mode()
    def put(self, slot: int, head: PreparedHead | None) -> None:
        """Fill a slot, or empty it.

        Kernels launched earlier may still read the slot's old head. They find it unchanged as long
        as everything runs on one stream: torch reuses freed memory only for later work of a stream.

        Args:
            slot: the slot to fill or empty.
            head: a head on the device, or None to empty the slot.
        """
        fields: tuple[int, ...] = (0,) * _FIELDS
        if head is not None:
            fields = head.table_row
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
        while self.max_units < len(head.b1):
            self.max_units *= 2

    def has_heads(self, slots: Iterable[int]) -> bool:
        """Return whether each of some slots has a head."""
        return self._heads.keys() >= set(slots)

    def __call__(
        self,
        h: Tensor,
        heads: Sequence[tuple[int, int]] | None,
        slots: Tensor,
        tile_sizes: Tensor,
        direction_scale: Tensor,
        step_sizes: Tensor,
    ) -> Tensor:
        """Refine n rows; see `apply_reward`.

        Rows whose slot has no head and whose count is 0 are left as they are.

        Args:
            h: (n, d) float32; the rows of one head are consecutive.
            heads: each head's slot and number of rows; None if it is not known, as in a CUDA graph
                that is replayed for other rows.
            slots: (n,) int32, each row's slot.
            tile_sizes: (n,) int32, as `tiles` returns them.
            direction_scale, step_sizes: (n, 1) and (n, most iterations) float32.

        Returns:
            (n, d) float32.
        """
        assert h.dtype == torch.float32, "addresses know no dtype"
        own = HeadLookup(self._table, slots, tile_sizes)
        # Kernels launch on the current device.
        with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
            if heads is not None and len(heads) == 1 and len(h) > TILE_ROWS:
                [(slot, _)] = heads
                return self._refine_one_head(h, self._heads[slot], own, direction_scale, step_sizes)
            return self._refine(h.contiguous(), own, direction_scale, step_sizes)

    def _refine(
        self, h: Tensor, heads: HeadLookup, direction_scale: Tensor, step_sizes: Tensor
    ) -> Tensor:
        units = self._kernels.units(h, heads, self.max_units)
        slopes, shifts = self._kernels.directional_step(units, heads, direction_scale)
        if step_sizes.shape[1]:
            gram_slopes = self._kernels.gram_slopes(slopes, heads)
            slope_sums = self._kernels.ascend(units, gram_slopes, heads, step_sizes)
        else:
            slope_sums = torch.zeros_like(units)
        return self._kernels.finish(h, shifts, slope_sums, heads)

    def _refine_one_head(
        self,
        h: Tensor,
        head: PreparedHead,
        heads: HeadLookup,
        direction_scale: Tensor,
        step_sizes: Tensor,
    ) -> Tensor:
        """Refine rows of one head, with torch's matrix products over all of them."""
        width = h.shape[1]
        w1 = head.w1[:, :width]
        units = linear(h, w1, head.b1)
        slopes, shifts = self._kernels.directional_step(units, heads, direction_scale)
        change = shifts * head.direction[:width]
        if step_sizes.shape[1]:
            gram_slopes = (slopes @ head.gram)[:, None]
            change = change.addmm(self._kernels.ascend(units, gram_slopes, heads, step_sizes), w1)
        # Adding 0 would turn -0.0 into +0.0.
        return torch.where(change == 0, h, h + change)


def tiles(heads: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Divide rows into tiles of one head each, of at most TILE_ROWS.

    Args:
        heads: each head's slot and number of rows, in the order of the rows.

    Returns:
        Each row's slot; and for each row the size of the tile that it begins, or 0 if it begins
        none.
    """
    slots: list[int] = []
    tile_sizes: list[int] = []
    for slot, rows in heads:
        slots += [slot] * rows
        for first in range(0, rows, TILE_ROWS):
            count = min(TILE_ROWS, rows - first)
            tile_sizes += [count] + [0] * (count - 1)
    return slots, tile_sizes
