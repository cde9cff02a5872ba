"""How a model's keys and values are kept: in which kind of memory, and how much of it."""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from server.engine.torch.attention_step import KVMemory
from server.engine.torch.devices import free_memory
from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.loader import ModelLoadError
from server.engine.torch.page_pool import PAGE
from server.engine.torch.paged_attention import PagedMemory
from server.engine.torch.slab import SlabShape
from server.engine.torch.slab_attention import SlabMemory
from server.engine.torch.soft_cap import (
    FlexSoftCapped,
    SoftCapped,
    choose_soft_capped,
    soft_capped_attention,
)
from server.engine.torch.varlen import VarlenForm, available_forms
from server.engine.torch.varlen_check import choose_form

_BLOCK_SIZE: Final = 16
# Of each device's memory that is free when the engine is built. What a host has is shared with
# others; what a GPU has left is for keys and values, but for the activations of a step.
_DEFAULT_KV_SHARE: Final = {"cpu": 0.25, "cuda": 0.8}
# Of a GPU's memory for keys and values, for copies of what may be wanted again. Slabs share what
# there is as it comes; pages are there from the start.
_PREFIX_SHARE: Final = 0.15
_LARGEST_HEAD: Final = 256  # of FlashAttention, which also wants multiples of 8
_FLASH_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Memory, and the books about it."""

    memory: KVMemory
    pool: BlockPool  # of the sequences that run
    prefixes: BlockPool  # that the prefix cache takes of; may be the same


@dataclass(frozen=True, slots=True)
class KVWishes:
    """What an operator wants of it."""

    gigabytes: float | None  # None: a share of what is free
    max_lanes: int  # that run at once
    prefix_cache: bool


def plan_kv(model: PreTrainedModel, wishes: KVWishes) -> KVPlan:
    """Memory that suits a model and the device that it is on.

    Raises:
        ModelLoadError: it would not hold a single block, or no attention of this torch computes
            rightly on the device.
    """
    shape = SlabShape.of(model)
    if suits_pages(model, shape):
        return plan_pages(model, shape, wishes, available_forms(varlen_attn))
    pool = BlockPool(
        _whole(_bytes(shape, wishes) // shape.bytes_per_token // _BLOCK_SIZE), _BLOCK_SIZE
    )
    return KVPlan(SlabMemory(shape, _soft_capped(model, shape)), pool, pool)


def _soft_capped(model: PreTrainedModel, shape: SlabShape) -> SoftCapped:
    """What attends for a model that bounds its scores; others never ask."""
    config = model.config.get_text_config()
    devices = set(shape.devices)
    bounded = getattr(config, "attn_logit_softcapping", None) is not None
    if not bounded or model.device.type != "cuda" or devices != {model.device}:
        return soft_capped_attention
    fold = config.num_attention_heads // shape.kv_heads
    return choose_soft_capped(FlexSoftCapped(), model.device, shape.dtype, shape.head_dim, fold)


def suits_pages(model: PreTrainedModel, shape: SlabShape) -> bool:
    """Whether FlashAttention takes a model as it is: on one GPU, in half precision, no soft cap."""
    config = model.config.get_text_config()
    return (
        model.device.type == "cuda"
        and set(shape.devices) == {model.device}
        and torch.cuda.get_device_capability(model.device) >= _FLASH_CAPABILITY
        and shape.dtype in (torch.float16, torch.bfloat16)
        and shape.head_dim % 8 == 0
        and shape.head_dim <= _LARGEST_HEAD
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def plan_pages(
    model: PreTrainedModel, shape: SlabShape, wishes: KVWishes, forms: list[VarlenForm]
) -> KVPlan:
    """Pages, attended to by the first of some forms that computes rightly.

    Raises:
        ModelLoadError: none does, or there is no room for a single page.
    """
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    form = choose_form(forms, shape, config.num_attention_heads, windowed)
    budget = _bytes(shape, wishes)
    kept = int(budget * _PREFIX_SHARE) if wishes.prefix_cache else 0
    pages = (budget - kept) // (shape.bytes_per_token * PAGE)
    # The books count the tokens of a sequence's two lanes together, of which each may begin a page
    # more; a probe, and rows that pad, take pages that nobody has counted.
    spare = wishes.max_lanes // 2 + PagedMemory.probe_lanes + 1
    pool = BlockPool(_whole(pages - spare), PAGE)
    prefixes = BlockPool(kept // (shape.bytes_per_token * _BLOCK_SIZE), _BLOCK_SIZE)
    return KVPlan(PagedMemory(shape, pages, form), pool, prefixes)


def _whole(blocks: int) -> int:
    if blocks < 1:
        raise ModelLoadError("the memory for keys and values does not hold a single block")
    return blocks


def _bytes(shape: SlabShape, wishes: KVWishes) -> int:
    """Of memory for the keys and values of all layers."""
    if wishes.gigabytes is not None:
        return int(wishes.gigabytes * 1e9)
    # A block is spread over all layers, so the tightest device decides.
    tokens = min(
        int(free_memory(device) * _DEFAULT_KV_SHARE[device.type])
        // (layers * shape.bytes_per_token_and_layer)
        for device, layers in Counter(shape.devices).items()
    )
    return tokens * shape.bytes_per_token
