"""Makes the engine's attention a backend of transformers' AttentionInterface, and an operator."""

from typing import Final, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from server.engine.torch.attention.backend import AttentionParams, AttentionStep
from steering.kernels.operators import define_operator

_NAME: Final = "steerserve"


class UnsupportedAttentionError(Exception):
    """The model asks for something that this backend does not compute."""


class _AttentionModule(Protocol):
    layer_idx: int


def engine_attention(
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
    layer_index: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend for the current step; transformers calls this as a layer's attention function.

    Args:
        query: (1, heads, tokens, head_dim); `key`, `value`: (1, kv_heads, tokens, head_dim).
        layer_index: () int64, given by compiled layers, which share one graph; else None.
        others: further arguments of transformers; any that would change the result is refused.

    Returns:
        (1, tokens, heads, head_dim) and no weights.

    Raises:
        UnsupportedAttentionError: the model asks for something that is not computed.
    """
    _refuse_unknown(attention_mask, dropout, is_causal, others)
    if layer_index is None:
        params = AttentionParams(scaling, sliding_window, softcap)
        return AttentionStep.active().attend(module.layer_idx, query, key, value, params), None
    output: Tensor = torch.ops.steerserve.attend(
        query, key, value, layer_index, scaling, sliding_window, softcap
    )
    return output, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend for the current step; compiled graphs call this as the operator `attend`."""
    params = AttentionParams(scaling, window, softcap)
    return AttentionStep.active().attend(int(layer), query, key, value, params).contiguous()


def _attend_fake(query: Tensor, *_others: object) -> Tensor:
    """Return an empty tensor of the shape of `_attend`'s output, for the compiler."""
    _, heads, tokens, head_dim = query.shape
    return query.new_empty((1, tokens, heads, head_dim))


define_operator(
    "attend(Tensor query, Tensor key, Tensor value, Tensor layer, float? scaling, int? window, "
    "float? softcap) -> Tensor",
    _attend,
    _attend_fake,
    backends=("CPU", "MkldnnCPU"),
)


def _refuse_unknown(
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, object],
) -> None:
    """Raise UnsupportedAttentionError if an argument asks for something that is not computed."""
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


def use_engine_attention(model: PreTrainedModel) -> None:
    """Make a model attend through this backend."""
    AttentionInterface.register(_NAME, engine_attention)
    model.set_attn_implementation(_NAME)
