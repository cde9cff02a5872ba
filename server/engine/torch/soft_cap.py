"""Attention whose scores are bounded: softcap * tanh(scores / softcap) (Gemma 2).

No fused kernel of torch's own has it. On a CPU it is plain arithmetic; on a GPU FlexAttention, for
which torch makes a kernel, where that computes rightly.
"""

import logging
from collections.abc import Callable
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

logger = logging.getLogger(__name__)

SoftCapped: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float | None, float], Tensor
]
"""As `soft_capped_attention`."""

# Of each, in the norm, beside plain arithmetic in float32.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """In plain arithmetic, which holds all scores in memory.

    Args:
        query: (n, kv_heads, queries, head_dim); `key`, `value`: (n, kv_heads, keys, head_dim).
        mask: added to the scores, broadcast; None where all keys are seen.
        scaling: None for 1 / sqrt(head_dim).

    Returns:
        (n, kv_heads, queries, head_dim).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


class FlexSoftCapped:
    """The same by FlexAttention, which holds no scores.

    torch compiles it when it is first called, and again for what it takes for another kind of
    shape.
    """

    def __init__(self, attend: Callable[..., Tensor] | None = None) -> None:
        """`attend` is `flex_attention`, or what a compiler makes of it."""
        compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
        self._attend = attend or compiled

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        softcap: float,
    ) -> Tensor:
        """See `soft_capped_attention`."""
        seen = None
        if mask is not None:  # (n or 1, 1, queries, keys)
            seen = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
            seen = seen.expand(len(query), 1, query.shape[2], key.shape[2])

        def bounded(
            score: Tensor, row: Tensor, _head: Tensor, place: Tensor, key_place: Tensor
        ) -> Tensor:
            score = softcap * torch.tanh(score / softcap)
            return score if seen is None else score + seen[row, 0, place, key_place]

        return self._attend(query, key, value, score_mod=bounded, scale=scaling)


def choose_soft_capped(
    flex: SoftCapped, device: torch.device, dtype: torch.dtype, head_dim: int, fold: int
) -> SoftCapped:
    """FlexAttention, if it computes rightly on a device; else plain arithmetic, with a warning.

    Args:
        fold: query heads of each KV head.
    """
    try:
        with torch.inference_mode():
            for rows, queries, keys, masked in (
                (1, fold, 40, False),
                (3, fold, 200, True),
                (1, 70 * fold, 300, True),
            ):
                _check(flex, _example(rows, queries, keys, head_dim, masked), device, dtype)
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        logger.warning("FlexAttention cannot be used, which is slower: %s", first_line)
        logger.debug("FlexAttention failed", exc_info=True)
        return soft_capped_attention
    return flex


def _example(rows: int, queries: int, keys: int, head_dim: int, masked: bool) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 2, queries, head_dim, generator=random)
    key, value = torch.randn(2, rows, 2, keys, head_dim, generator=random)
    if not masked:
        return [query, key, value]
    mask = torch.zeros(rows, 1, 1, keys)
    mask[:, :, :, keys // 3 :: 3] = -torch.inf
    return [query, key, value, mask]


def _check(
    flex: SoftCapped, example: list[Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    query, key, value, *masks = (tensor.to(device, dtype) for tensor in example)
    mask = masks[0] if masks else None
    found = flex(query, key, value, mask, None, 2.0).float()
    exact = None if mask is None else mask.float()
    expected = soft_capped_attention(query.float(), key.float(), value.float(), exact, None, 2.0)
    difference = float((found - expected).norm() / expected.norm())
    if not difference < _TOLERANCE[dtype]:
        raise ArithmeticError(f"its output is off by {difference:.2g}")
