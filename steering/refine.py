"""Rows refined by several reward heads at once.

Where a CPU computes them, h and its units u = W1 h + b1 are carried through the steps together,
as one state [h | u] of each row. A step along the gradient g moves it by eta [g | W1 g]. From one
step to the next, few units (5 of 1024 in a trained head) pass zero: their rows of [W1 | W1 W1^T]
are all that [g | W1 g] changes by, so that a head of common size is multiplied by three times,
however many the steps. All but those products is done for all heads' rows together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from steering.prepared_head import PreparedHead
from steering.reward import RewardHead, apply_reward, slopes, stays_as_it_is

Heads: TypeAlias = Sequence[tuple[RewardHead, int, int]]
"""Heads, how many rows each edits, and their most iterations: first come the rows of the first."""


def refine(h: Tensor, heads: Heads, direction_scale: Tensor, step_sizes: Tensor) -> Tensor:
    """Refine n rows, each by its own head with its own settings; see `apply_reward`.

    Args:
        h: (n, d) float32.
        heads: all of width d, with n rows together.
        direction_scale, step_sizes: as `apply_reward` takes them.

    Returns:
        (n, d) float32.
    """
    prepared = [head.prepared for head, _, _ in heads if head.prepared is not None]
    if len(prepared) == len(heads):
        counts = [count for _, count, _ in heads]
        return _climb(h, _Stack(prepared, counts), direction_scale, step_sizes)
    edited = []
    first = 0
    for head, count, most in heads:
        own = slice(first, first + count)
        first += count
        edited.append(apply_reward(h[own], head, direction_scale[own], step_sizes[own, :most]))
    return torch.cat(edited)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The heads of n rows. Those with fewer than m units have others, which do nothing."""

    heads: list[PreparedHead]
    counts: list[int]

    @property
    def units(self) -> int:
        """m, of the widest."""
        return max(head.units for head in self.heads)

    def of_rows(self, parameters: Sequence[Tensor]) -> Tensor:
        """Some of each head's parameters, for each of its rows: (k,) each -> (n, k)."""
        if len(parameters) == 1:
            return parameters[0].expand(self.counts[0], -1)
        width = max(each.numel() for each in parameters)
        rows = zip(parameters, self.counts, strict=True)
        return torch.cat([_widened(each.expand(count, -1), width) for each, count in rows])

    def each(
        self, product: Callable[[PreparedHead, Tensor], Tensor], rows: Tensor, width: int
    ) -> Tensor:
        """What each head makes of its rows, as wide as the widest: (n, _) -> (n, width)."""
        if len(self.heads) == 1:
            return product(self.heads[0], rows)
        parts = zip(self.heads, torch.split(rows, self.counts), strict=True)
        return torch.cat([_widened(product(head, part), width) for head, part in parts])

    def add_along(self, motion: Tensor, flips: Tensor) -> None:
        """Add what flips of slopes, (n, m) and mostly zero, do to a motion, (n, d + m)."""
        rows, units = flips.nonzero(as_tuple=True)
        weights = flips[rows, units]
        firsts = torch.searchsorted(rows, torch.arange(len(flips)))
        if len(self.heads) == 1:
            motion.add_(self.heads[0].along_few(units, firsts, weights))
            return
        borders = [*firsts.tolist(), len(rows)]
        first = 0
        for head, count in zip(self.heads, self.counts, strict=True):
            own, few = slice(first, first + count), slice(borders[first], borders[first + count])
            first += count
            if few.start < few.stop:
                along = head.along_few(units[few], firsts[own] - few.start, weights[few])
                motion[own, : along.shape[1]].add_(along)


def _climb(h: Tensor, stack: _Stack, direction_scale: Tensor, step_sizes: Tensor) -> Tensor:
    d, m = h.shape[1], stack.units
    w2 = stack.of_rows([head.w2 for head in stack.heads])
    units = stack.each(PreparedHead.forth, h, m) + stack.of_rows([head.b1 for head in stack.heads])
    wanted = stack.of_rows([head.wanted for head in stack.heads])
    gap = wanted - (torch.relu(units) * w2).sum(dim=1, keepdim=True)
    step = stack.of_rows([head.step for head in stack.heads])
    stays = stays_as_it_is(gap, direction_scale)
    state = torch.cat((h, units), dim=1)
    state = torch.where(stays, state, state + direction_scale * gap * step)
    if not step_sizes.shape[1]:
        return state[:, :d]
    slope = slopes(state[:, d:], w2)
    motion = stack.each(PreparedHead.along, slope, d + m)
    first, *others = torch.unbind(step_sizes[:, :, None], dim=1)
    alike = bool(step_sizes.all())
    state = _moved(state, first, motion, alike)
    for eta in others:
        before, slope = slope, slopes(state[:, d:], w2)
        stack.add_along(motion, slope - before)
        state = _moved(state, eta, motion, alike)
    return state[:, :d]


def _moved(state: Tensor, eta: Tensor, motion: Tensor, alike: bool) -> Tensor:
    """A step of each row; `alike` says that none has done its own before the others."""
    moved = torch.addcmul(state, eta, motion)
    # What a row that has would be moved by may be infinite, and 0 times it NaN.
    return moved if alike else torch.where(eta == 0, state, moved)


def _widened(rows: Tensor, width: int) -> Tensor:
    """With zeros after the last column."""
    missing = width - rows.shape[1]
    return pad(rows, (0, missing)) if missing else rows
