"""Attention over the engine's own K/V cache, as a backend of transformers' AttentionInterface.

On the CPU every sequence has its keys and values in one contiguous slab. Tokens of all sequences
come packed in one row; each sequence attends to its own slab, so its result does not depend on
what else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from server.engine.torch.slab import Slab

_NAME = "steerserve_slab"


class UnsupportedAttentionError(Exception):
    """The model asks for something that this backend does not compute."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in a step."""

    slab: Slab
    start: int  # tokens that the slab holds already
    count: int


@dataclass(slots=True)
class AttentionStep:
    """What the backend knows of one step: who owns which of the packed tokens."""

    segments: Sequence[Segment]
    windows: set[int | None] = field(default_factory=set)  # that the layers asked for
    _masks: dict[tuple[int, int, int | None, int, torch.device], Tensor] = field(
        default_factory=dict
    )

    def mask(self, segment: Segment, window: int | None, fold: int, device: torch.device) -> Tensor:
        """(fold * count, keys) bool: which keys each query of a chunk sees, made once a step."""
        key = (segment.start, segment.count, window, fold, device)
        if key not in self._masks:
            end = segment.start + segment.count
            queries = torch.arange(segment.start, end, device=device)[:, None]
            keys = torch.arange(_first_key(segment, window), end, device=device)[None, :]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self._masks[key] = seen.repeat(fold, 1)
        return self._masks[key]


class _AttentionModule(Protocol):
    layer_idx: int


def _first_key(segment: Segment, window: int | None) -> int:
    """The first key that any query of the segment sees."""
    return 0 if window is None else max(0, segment.start + 1 - window)


def slab_attention(
    module: _AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    *,
    attention: AttentionStep,
    **others: object,
) -> tuple[Tensor, None]:
    """Store the step's keys and values, then attend.

    Args:
        query: (1, heads, tokens, head_dim); `key`, `value`: (1, kv_heads, tokens, head_dim).
        sliding_window: how many keys, its own among them, a query sees.
        softcap: scores are bounded by it as softcap * tanh(scores / softcap) (Gemma 2).
        attention: the step, passed through the model's keyword arguments.
        others: what transformers passes along; anything that would change the result is refused.

    Returns:
        (1, tokens, heads, head_dim) and no weights.
    """
    _refuse_unknown(attention_mask, dropout, is_causal, others)
    attention.windows.add(sliding_window)
    new = torch.stack((key[0], value[0]))  # (2, kv_heads, tokens, head_dim)
    outputs = []
    first = 0
    for segment in attention.segments:
        place = slice(first, first + segment.count)
        layer = segment.slab.layers[module.layer_idx]
        layer[:, :, segment.start : segment.start + segment.count] = new[:, :, place]
        queries = _Queries(query[:, :, place], segment, attention, sliding_window, scaling, softcap)
        outputs.append(queries.attend(layer))
        first += segment.count
    return torch.cat(outputs, dim=1), None


@dataclass(frozen=True, slots=True, eq=False)
class _Queries:
    """One sequence's queries in one layer: (1, heads, n, head_dim)."""

    query: Tensor
    segment: Segment
    step: AttentionStep
    window: int | None
    scaling: float | None
    softcap: float | None

    def attend(self, layer: Tensor) -> Tensor:
        """To the keys and values of `layer`, (2, kv_heads, capacity, head_dim).

        The query heads that share a KV head are folded into the query dimension, so that K and V
        are read once and not repeated.

        Returns:
            (1, n, heads, head_dim).
        """
        segment = self.segment
        _, heads, count, head_dim = self.query.shape
        kv_heads = layer.shape[1]
        fold = heads // kv_heads
        seen = slice(_first_key(segment, self.window), segment.start + count)
        device = self.query.device
        mask = None if count == 1 else self.step.mask(segment, self.window, fold, device)
        query = self.query.reshape(1, kv_heads, fold * count, head_dim)
        key, value = layer[0:1, :, seen], layer[1:2, :, seen]
        if self.softcap is None:
            output = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scaling
            )
        else:
            output = soft_capped_attention(query, key, value, mask, self.scaling, self.softcap)
        return output.reshape(1, heads, count, head_dim).transpose(1, 2)


def soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention whose scores are bounded, in eager arithmetic: no fused kernel of torch has it.

    Args:
        query: (1, kv_heads, n, head_dim); `key`, `value`: (1, kv_heads, keys, head_dim).
        mask: (n, keys) bool, which keys are seen; None for all.

    Returns:
        (1, kv_heads, n, head_dim).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def _refuse_unknown(
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, object],
) -> None:
    """Raise UnsupportedAttentionError for what would change the result and is not computed."""
    asked = [
        name
        for name in ("s_aux", "position_bias", "cu_seq_lens_q", "indices")
        if others.get(name) is not None
    ]
    if attention_mask is not None:
        asked.append("attention_mask")
    if dropout:
        asked.append("dropout")
    if is_causal is False:
        asked.append("is_causal=False")
    if asked:
        raise UnsupportedAttentionError(f"the model's attention uses {', '.join(asked)}")


def use_slab_attention(model: PreTrainedModel) -> None:
    """Make a model attend through this backend."""
    AttentionInterface.register(_NAME, slab_attention)
    model.set_attn_implementation(_NAME)
