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

_NAME = "steerserve_slab"


class UnsupportedAttentionError(Exception):
    """The model asks for something that this backend does not compute."""


class Slab:
    """The keys and values of one sequence, all layers.

    Room for `capacity` tokens is taken at once; on Linux memory is only spent on the pages that
    have been written, so a short answer to a long `max_tokens` costs what it used.
    """

    def __init__(self, shape: "SlabShape", capacity: int) -> None:
        storage = torch.empty(
            shape.layers,
            2,
            shape.kv_heads,
            capacity,
            shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
        )
        self.layers = storage.unbind(0)  # each (2, kv_heads, capacity, head_dim)


@dataclass(frozen=True, slots=True)
class SlabShape:
    """What one token's keys and values are."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel) -> "SlabShape":
        """The shape that a model's configuration tells."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=model.dtype,
            device=model.device,
        )

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


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
    _masks: dict[tuple[int, int, int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, segment: Segment, window: int | None, fold: int, device: torch.device) -> Tensor:
        """(fold * count, keys) bool: which keys each query of a chunk sees, made once a step."""
        key = (segment.start, segment.count, window, fold)
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
    *,
    attention: AttentionStep,
    **others: object,
) -> tuple[Tensor, None]:
    """Store the step's keys and values, then attend.

    Args:
        query: (1, heads, tokens, head_dim); `key`, `value`: (1, kv_heads, tokens, head_dim).
        sliding_window: how many keys, its own among them, a query sees.
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
        outputs.append(
            _attend(query[:, :, place], layer, segment, attention, sliding_window, scaling)
        )
        first += segment.count
    return torch.cat(outputs, dim=1), None


def _attend(
    query: Tensor,
    layer: Tensor,
    segment: Segment,
    step: AttentionStep,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """(1, heads, n, head_dim) queries of one sequence -> (1, n, heads, head_dim).

    The query heads that share a KV head are folded into the query dimension, so that K and V are
    read once and not repeated.
    """
    _, heads, count, head_dim = query.shape
    kv_heads = layer.shape[1]
    fold = heads // kv_heads
    seen = slice(_first_key(segment, window), segment.start + count)
    mask = None if count == 1 else step.mask(segment, window, fold, query.device)
    output = scaled_dot_product_attention(
        query.reshape(1, kv_heads, fold * count, head_dim),
        layer[0:1, :, seen],
        layer[1:2, :, seen],
        attn_mask=mask,
        scale=scaling,
    )
    return output.reshape(1, heads, count, head_dim).transpose(1, 2)


def _refuse_unknown(
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, object],
) -> None:
    """Raise UnsupportedAttentionError for what would change the result and is not computed."""
    asked = [
        name
        for name in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "indices")
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
