"""Chooses the kind of memory that a model's keys and values are kept in, and its size."""

import importlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import torch
from transformers import PreTrainedModel

from server.engine.model.description import ModelLoadError
from server.engine.torch.attention.backend import KVMemory
from server.engine.torch.attention.mapped import PAGE_BYTES, whole_pages
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.attention.paged_check import check_pages
from server.engine.torch.attention.paged_index import PagedAttention, Tiling
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.model.devices import free_memory
from server.engine.torch.model.fallback import fall_back, first_line
from server.engine.torch.options import AttentionChoice
from server.engine.torch.scheduling.block_pool import BlockPool

_BLOCK_SIZE: Final = 16  # tokens
_SPARE: Final = 64  # with slabs, one block in so many is left unused
# Blocks are counted in pages of the operating system if such a page holds at most so many tokens of
# a head. It holds more only in toy models, whose blocks are counted in tokens.
_LARGEST_PAGE: Final = 64
# The share of a device's free memory that keys and values get, when the engine is built: on a CPU,
# whose memory other processes use too, and on each of several GPUs. For a single GPU `memory_plan`
# computes the size.
_FREE_SHARE: Final = {"cpu": 0.25, "cuda": 0.8}
# The share of the memory for keys and values that is left to the prefix cache where there are
# pages, which are all allocated at the start. Slabs and the cache share one budget instead.
_PREFIX_SHARE: Final = 0.15
_LARGEST_HEAD: Final = 256  # the widest head whose tiles fit into a GPU's shared memory
_TENSOR_CORES: Final = (8, 0)  # Ampere's compute capability, the first with bfloat16 tensor cores
_KERNEL: Final = "server.engine.torch.cuda.paged_kernel"


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Memory for keys and values, and the pools that count its blocks."""

    memory: KVMemory
    pool: BlockPool  # for running sequences
    prefixes: BlockPool  # for the prefix cache; the same pool where memory is slabs


@dataclass(frozen=True, slots=True)
class KVOptions:
    """Holds what the operator asks of the memory for keys and values."""

    attention: AttentionChoice
    prefix_cache: bool
    bytes: int | None  # its size; None for a share of the free memory


def plan_kv(model: PreTrainedModel, options: KVOptions) -> KVPlan:
    """Make memory that suits a model and its device.

    Falls back to slabs, with a warning, where pages would suit both but do not work.

    Raises:
        ModelLoadError: the memory would not hold a single block; or pages were asked for, but do
            not suit the device or the model, or do not work.
    """
    shape = KVShape.of(model)
    unsuited = pages_unsupported_reason(model, shape)
    if options.attention == "pages" and unsuited is not None:
        raise ModelLoadError(f"attention over pages cannot be used: {unsuited} (--attention)")
    if options.attention == "slabs" or unsuited is not None:
        return plan_slabs(shape, options)
    tiling = tiling_of(model, shape)
    try:
        attend = checked_kernel(model, shape, tiling)
    except Exception as error:
        if options.attention == "pages":
            raise ModelLoadError(
                f"attention over pages does not work here (--attention slabs does without): "
                f"{first_line(error)}"
            ) from error
        fall_back(
            error,
            model.device,
            "attention over pages (--attention slabs does without)",
            "keys and values lie in slabs, which is slower, as with --attention slabs",
        )
        return plan_slabs(shape, options)
    return plan_pages(shape, options, tiling, attend)


def pages_unsupported_reason(model: PreTrainedModel, shape: KVShape) -> str | None:
    """Say why a model on its device cannot use attention over pages; None if it can."""
    if model.device.type != "cuda":
        return "pages are for a GPU"
    if set(shape.devices) != {model.device}:
        return "the model is spread over several devices"
    if torch.cuda.get_device_capability(model.device) < _TENSOR_CORES:
        return "the GPU is older than NVIDIA's Ampere"
    if shape.head_dim > _LARGEST_HEAD:
        return f"the model's heads are wider than {_LARGEST_HEAD}"
    return None


def tiling_of(model: PreTrainedModel, shape: KVShape) -> Tiling:
    """Return how a model's attention is divided among the multiprocessors of its GPU."""
    processors = 1
    if model.device.type == "cuda":
        processors = torch.cuda.get_device_properties(model.device).multi_processor_count
    heads: int = model.config.get_text_config().num_attention_heads
    return Tiling(heads, shape.kv_heads, shape.dtype.itemsize, processors)


def checked_kernel(model: PreTrainedModel, shape: KVShape, tiling: Tiling) -> PagedAttention:
    """Import the kernel for attention over pages, and check it on the device.

    Raises:
        Exception: the kernel is not there, does not compile, or is wrong; of any type.
    """
    attend: PagedAttention = importlib.import_module(_KERNEL).attend_pages
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    softcap: float | None = getattr(config, "attn_logit_softcapping", None)
    check_pages(attend, shape, tiling, windowed, softcap)
    return attend


def plan_slabs(shape: KVShape, options: KVOptions) -> KVPlan:
    """Plan slabs, which share their memory with the prefix cache.

    Raises:
        ModelLoadError: there is no room for a single block.
    """
    # The prefix cache's copy of a block takes whole pages of the operating system.
    blocks = _budget(shape, options) // whole_pages(_BLOCK_SIZE * shape.bytes_per_token)
    blocks -= blocks // _SPARE  # room for tokens that are in memory twice while being moved
    page_tokens = max(Fraction(PAGE_BYTES, shape.head_bytes), Fraction(1))
    if page_tokens > _LARGEST_PAGE:
        page_tokens = Fraction(1)
    pool = BlockPool(_at_least_one(blocks), _BLOCK_SIZE, page_tokens)
    return KVPlan(SlabMemory(shape), pool, pool)


def plan_pages(
    shape: KVShape, options: KVOptions, tiling: Tiling, attend: PagedAttention
) -> KVPlan:
    """Plan pages, and allocate all of them now.

    Raises:
        ModelLoadError: there is no room for a single page, or the device lacks the memory.
    """
    budget = _budget(shape, options)
    kept = int(budget * _PREFIX_SHARE) if options.prefix_cache else 0
    pages = (budget - kept) // (shape.bytes_per_token * PAGE)
    # The self-test's lanes and the scratch page are not counted in the pool.
    spare = PagedMemory.probe_lanes + 1
    pool = BlockPool(_at_least_one(pages - spare), PAGE)
    prefixes = BlockPool(kept // (shape.bytes_per_token * _BLOCK_SIZE), _BLOCK_SIZE)
    try:
        memory = PagedMemory(shape, pages, tiling, attend)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the GPU has not the {budget / 1e9:.1f} GB for keys and values; choose fewer with "
            "--kv-cache-gb"
        ) from error
    return KVPlan(memory, pool, prefixes)


def _at_least_one(blocks: int) -> int:
    if blocks < 1:
        raise ModelLoadError(
            "the memory for keys and values does not hold a single block; free some, or lower "
            "--max-batch-size, --max-batch-tokens or --max-loaded-interventions"
        )
    return blocks


def _budget(shape: KVShape, options: KVOptions) -> int:
    """Return how many bytes the keys and values of all layers get."""
    if options.bytes is not None:
        return options.bytes
    # A block is spread over all layers, so the tightest device decides.
    tokens = min(
        int(free_memory(device) * _FREE_SHARE[device.type])
        // (layers * shape.bytes_per_token_and_layer)
        for device, layers in Counter(shape.devices).items()
    )
    return tokens * shape.bytes_per_token
