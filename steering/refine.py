"""Rows refined by several reward heads at once.

Where a CPU computes them, h and its units u = W1 h + b1 are carried through the steps together,
as one state [h | u] of each row. A step along the gradient g moves it by eta [g | W1 g]. From one
step to the next, few units (5 of 1024 in a trained head) pass zero: their rows of [W1 | W1 W1^T]
are all that [g | W1 g] changes by, so that a head of common size is multiplied by three times,
however many the steps. All but those products is done for all heads' rows together; a row that has
a head to itself begins by itself, where a compiler has made a loop for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from steering.prepared_head import PreparedHead
from steering.reward import RewardHead, apply_reward, slopes, stays_as_it_is

_FIRST: Final = torch.zeros(1, dtype=torch.int64)


class Headed(NamedTuple):
    """A head, and the rows that it edits: those after the rows of the head before it."""

    head: RewardHead
    rows: int
    most_iterations: int


Begin: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`begin_one_row`, as it is or compiled."""


def refine(
    h: Tensor,
    heads: Sequence[Headed],
    direction_scale: Tensor,
    step_sizes: Tensor,
    alike: bool,
    compiled: Callable[[PreparedHead], Begin | None] = lambda _head: None,
) -> Tensor:
    """Refine n rows, each by its own head with its own settings; see `apply_reward`.

    Args:
        h: (n, d) float32.
        heads: all of width d, with n rows together.
        direction_scale, step_sizes: as `apply_reward` takes them.
        alike: whether none of the step sizes is 0.
        compiled: what begins a row by a head that has no other; None where nothing faster is at
            hand.

    Returns:
        (n, d) float32.
    """
    prepared = [head.prepared for head, _, _ in heads if head.prepared is not None]
    if len(prepared) == len(heads):
        stack = _Stack(prepared, [each.rows for each in heads])
        begun = _begin(h, stack, direction_scale, step_sizes.shape[1] > 0, compiled)
        return _climb(begun, stack, step_sizes, alike)[:, : h.shape[1]]
    edited = []
    first = 0
    for head, count, most in heads:
        own = slice(first, first + count)
        first += count
        edited.append(apply_reward(h[own], head, direction_scale[own], step_sizes[own, :most]))
    return torch.cat(edited)


@dataclass(frozen=True)
class _Stack:
    """The heads of n rows. Those with fewer than m units have others, which do nothing."""

    heads: list[PreparedHead]
    counts: list[int]

    @property
    def units(self) -> int:
        """m, of the widest."""
        return max(head.units for head in self.heads)

    @cached_property
    def w2(self) -> Tensor:
        """(n, m)."""
        return self.of_rows([head.w2 for head in self.heads])

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
        single = len(flips) == 1
        firsts = _FIRST if single else torch.searchsorted(rows, torch.arange(len(flips)))
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


class _Begun(NamedTuple):
    """Of n rows, before their first step along the gradient."""

    state: Tensor  # (n, d + m), after the directional step
    slope: Tensor  # (n, m), of its units
    motion: Tensor  # (n, d + m), along the gradient


def _climb(begun: _Begun, stack: _Stack, step_sizes: Tensor, alike: bool) -> Tensor:
    """The state of each row after its last step: (n, d + m)."""
    state, slope, motion = begun
    for step, eta in enumerate(torch.unbind(step_sizes[:, :, None], dim=1)):
        if step:
            before, slope = slope, slopes(state[:, -stack.units :], stack.w2)
            stack.add_along(motion, slope - before)
        state = _moved(state, eta, motion, alike)
    return state


def _begin(
    h: Tensor,
    stack: _Stack,
    direction_scale: Tensor,
    climbs: bool,
    compiled: Callable[[PreparedHead], Begin | None],
) -> _Begun:
    """Row after row by what is compiled for its head, those between them together.

    What begins a row depends on its own head only, and so do its bits.
    """
    begins = [
        compiled(head) if count == 1 else None
        for head, count in zip(stack.heads, stack.counts, strict=True)
    ]
    parts: list[_Begun] = []
    first = 0
    each = zip(stack.heads, stack.counts, begins, strict=True)
    for begin, run in groupby(each, key=lambda head: head[2]):
        heads, counts = zip(*((head, count) for head, count, _ in run), strict=True)
        own = slice(first, first + sum(counts))
        first = own.stop
        if begin is None:
            part = _Stack(list(heads), list(counts))
            parts.append(_begin_together(h[own], part, direction_scale[own], climbs))
        else:
            rows, scales = torch.split(h[own], 1), torch.split(direction_scale[own], 1)
            parts += [
                _Begun(*begin(row, scale, **head.one_row))
                for row, scale, head in zip(rows, scales, heads, strict=True)
            ]
    if len(parts) == 1:
        return parts[0]
    d, m = h.shape[1], stack.units
    return _Begun(
        torch.cat([_widened(part.state, d + m) for part in parts]),
        torch.cat([_widened(part.slope, m) for part in parts]),
        torch.cat([_widened(part.motion, d + m) for part in parts]),
    )


def _begin_together(h: Tensor, stack: _Stack, direction_scale: Tensor, climbs: bool) -> _Begun:
    d, m = h.shape[1], stack.units
    state = _directed(h, stack, direction_scale)
    slope = slopes(state[:, d:], stack.w2)
    along = PreparedHead.along
    motion = stack.each(along, slope, d + m) if climbs else torch.zeros_like(state)
    return _Begun(state, slope, motion)


def _directed(h: Tensor, stack: _Stack, direction_scale: Tensor) -> Tensor:
    """The state of each row after its directional step: (n, d + m)."""
    m = stack.units
    units = stack.each(PreparedHead.forth, h, m) + stack.of_rows([head.b1 for head in stack.heads])
    wanted = stack.of_rows([head.wanted for head in stack.heads])
    step = stack.of_rows([head.step for head in stack.heads])
    gap = wanted - (torch.relu(units) * stack.w2).sum(dim=1, keepdim=True)
    state = torch.cat((h, units), dim=1)
    moved = state + direction_scale * gap * step
    return torch.where(stays_as_it_is(gap, direction_scale), state, moved)


def begin_one_row(
    h: Tensor,
    direction_scale: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    wanted: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A single row's directional step and first gradient, in loops that a compiler can fuse.

    Uncompiled, it would be slower than what it is compiled for.

    Args:
        h: (1, d); direction_scale: (1, 1); the rest as `PreparedHead` has it. All float32.

    Returns:
        The state after the directional step, (1, d + m); its slopes, (1, m); the motion along the
        gradient, (1, d + m).
    """
    units = (w1 * h).sum(dim=1)[None] + b1
    gap = wanted - (torch.relu(units) * w2).sum(dim=1, keepdim=True)
    state = torch.cat((h, units), dim=1)
    moved = state + direction_scale * gap * step
    state = torch.where(stays_as_it_is(gap, direction_scale), state, moved)
    slope = slopes(state[:, h.shape[1] :], w2[None])
    gradient = (w1 * slope.T).sum(dim=0)[None]
    return state, slope, torch.cat((gradient, (w1 * gradient).sum(dim=1)[None]), dim=1)


def _moved(state: Tensor, eta: Tensor, motion: Tensor, alike: bool) -> Tensor:
    """A step of each row; `alike` says that none has done its own before the others."""
    moved = torch.addcmul(state, eta, motion)
    # What a row that has would be moved by may be infinite, and 0 times it NaN.
    return moved if alike else torch.where(eta == 0, state, moved)


def _widened(rows: Tensor, width: int) -> Tensor:
    """With zeros after the last column."""
    missing = width - rows.shape[1]
    return pad(rows, (0, missing)) if missing else rows
