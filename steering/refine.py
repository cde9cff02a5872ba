"""Refines rows by several reward heads, with `NativeRefinement` where it can."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steering.native import NativeRefinement
from steering.reward import RewardHead, apply_reward


class HeadGroup(NamedTuple):
    """A head, and the number of consecutive rows that it edits."""

    head: RewardHead
    rows: int
    most_iterations: int  # the largest among these rows


def refine(
    h: Tensor,
    heads: Sequence[HeadGroup],
    direction_scale: Tensor,
    step_sizes: Tensor,
    native: NativeRefinement | None = None,
) -> Tensor:
    """Refine n rows, each by its own head with its own settings; see `apply_reward`.

    A row's own head alone decides whether `native` or `apply_reward` computes it, so that its bits
    do not depend on the other heads in the batch.

    Args:
        h: (n, d) float32, grouped by head in the order of `heads`.
        heads: all of width d, with n rows together.
        direction_scale, step_sizes: as `apply_reward` takes them.
        native: refines the rows of prepared heads; None: `apply_reward` refines all rows.

    Returns:
        (n, d) float32.
    """
    prepared = [(each.head.prepared, each.rows) for each in heads if each.head.prepared is not None]
    if native is not None and len(prepared) == len(heads):
        return native(h, prepared, direction_scale, step_sizes)
    refined = []
    first = 0
    for head, count, most in heads:
        own = slice(first, first + count)
        first = own.stop
        rows, scales, sizes = h[own], direction_scale[own], step_sizes[own, :most]
        if native is None or head.prepared is None:
            refined.append(apply_reward(rows, head, scales, sizes))
        else:
            refined.append(native(rows, [(head.prepared, count)], scales, sizes))
    return torch.cat(refined)
