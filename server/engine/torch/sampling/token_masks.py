"""Keeps each row's draw to the tokens that may come next."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from server.engine.torch.model.transfer import device_tensor, to_device


def allow(logits: Tensor, masks: Sequence[bytes | None]) -> Tensor:
    """Return the logits with -inf for the tokens that a row's grammar does not allow.

    Args:
        logits: (rows, vocabulary) float32.
        masks: one bit for each token, as `GrammarState.mask` returns them, padded to whole words
            of 32 bits; None for a row without a grammar.

    Returns:
        (rows, vocabulary) float32: a copy, or `logits` itself if no row has a grammar.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    joined = bytearray().join(mask for mask in masks if mask is not None)
    (words,) = to_device(
        [torch.frombuffer(joined, dtype=torch.int32).view(len(rows), -1)], logits.device
    )
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits & 1).flatten(1)[:, : logits.shape[-1]].bool()
    places = device_tensor(rows, logits.device)
    return logits.index_put((places,), logits[places].masked_fill(~allowed, -torch.inf))


def forbid(logits: Tensor, tokens: Sequence[Collection[int]]) -> Tensor:
    """Return the logits with -inf for each row's forbidden tokens.

    Args:
        logits: (rows, vocabulary) float32.
        tokens: for each row the ids that it must not draw.

    Returns:
        (rows, vocabulary) float32: a copy, or `logits` itself if nothing is forbidden.
    """
    rows = [row for row, forbidden in enumerate(tokens) for _ in forbidden]
    if not rows:
        return logits
    flat = [token for forbidden in tokens for token in forbidden]
    places = (device_tensor(rows, logits.device), device_tensor(flat, logits.device))
    return logits.index_put(places, logits.new_full((), -torch.inf))
