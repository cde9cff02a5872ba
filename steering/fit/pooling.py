"""Pools a sequence's activations over its tokens, so that each sequence gives one vector.

The LinEAS authors use the mean. The other modes are those of their code: the smallest or largest
value of each neuron, and the last token.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Pooling: TypeAlias = Literal["mean", "min", "max", "last"]


def pool_tokens(z: Tensor, attention_mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """Return one vector for each sequence, from its own tokens and not from the padding.

    Args:
        z: (n, t, d), any floating dtype; sequences are padded on the right.
        attention_mask: (n, t) int64, 1 for a token and 0 for padding; at least one token each.
        pooling: mean, min or max of each neuron over the tokens, or the last token's value.

    Returns:
        (n, d) float32.
    """
    match pooling:
        case "mean":
            return token_mean(z, attention_mask)
        case "last":
            rows = torch.arange(len(z), device=z.device)
            return z[rows, attention_mask.sum(dim=1) - 1].float()
        case "min":
            return _padded_with(z, attention_mask, torch.inf).amin(dim=1)
        case "max":
            return _padded_with(z, attention_mask, -torch.inf).amax(dim=1)


def token_mean(z: Tensor, attention_mask: Tensor) -> Tensor:
    """Return each sequence's mean over its own tokens: (n, t, d) -> (n, d) float32."""
    mask = attention_mask[:, :, None].float()
    return (z.float() * mask).sum(dim=1) / mask.sum(dim=1)


def _padded_with(z: Tensor, attention_mask: Tensor, value: float) -> Tensor:
    return z.float().masked_fill(attention_mask[:, :, None] == 0, value)
