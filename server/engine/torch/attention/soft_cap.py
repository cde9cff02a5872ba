"""Computes attention whose scores are bounded: softcap * tanh(scores / softcap) (Gemma 2).

torch's scaled_dot_product_attention has no soft cap, so attention over slabs (contiguous keys and
values) needs this plain arithmetic.
"""

import torch
from torch import Tensor


def soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attend in plain arithmetic, which holds all scores in memory.

    Args:
        query: (n, kv_heads, queries, head_dim), for n sequences; the queries of all heads that
            share a key head are side by side.
        key, value: (n, kv_heads, keys, head_dim).
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
