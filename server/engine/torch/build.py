"""Puts a loaded model's engine together, and tests it on the model before anything is served."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from server.engine.torch.attention import use_slab_attention
from server.engine.torch.compiled import CompiledLayers
from server.engine.torch.core import EngineCore
from server.engine.torch.decoder import DecoderLayers
from server.engine.torch.devices import free_memory
from server.engine.torch.interventions import LoadedInterventions
from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.loader import LoadedModel, ModelLoadError
from server.engine.torch.packed import pack_linear_layers
from server.engine.torch.prefix_cache import PrefixCache
from server.engine.torch.runner import Runner
from server.engine.torch.scheduler import Scheduler
from server.engine.torch.self_test import (
    check_forward,
    check_lm_head,
    dead_sites,
    record_layers,
    reference_logits,
)
from server.engine.torch.slab import SlabShape
from steering.hooks import SteeringHooks
from steering.sites import SiteError, default_sites, match_sites

_BLOCK_SIZE = 16
# Of each device's memory that is free when the engine is built. What a host has is shared with
# others; what a GPU has left is for keys and values, but for the activations of a step.
_DEFAULT_KV_SHARE = {"cpu": 0.25, "cuda": 0.8}
# Of prompts, in a step that others wait for to get their next token: about as long as the rest.
_PREFILL_TOKENS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an operator may choose of the torch engine."""

    max_batch_size: int = 64  # sequences running at once
    max_batch_tokens: int = 512  # tokens of one step
    max_waiting: int = 256
    max_model_len: int | None = None  # None: the model's own
    kv_cache_gb: float | None = None  # None: a share of what is free, see `_DEFAULT_KV_SHARE`
    max_loaded_interventions: int = 64
    compile_layers: bool = False  # layers, in the background, on a CPU
    prefix_cache: bool = True  # computed blocks are kept for whoever begins with the same tokens
    prefill_tokens: int | None = None  # None: by device, see `_PREFILL_TOKENS`
    check_invariants: bool = False  # after every step; a debugging aid
    dose_interval: int = 16  # edits are measured in one of so many steered steps; 0 for never


def build_core(loaded: LoadedModel, options: EngineOptions) -> EngineCore:
    """The engine's inside, tested on the model.

    Raises:
        ModelLoadError: the engine would compute something else than the model, or an edit would
            not reach the logits.
    """
    model = loaded.model
    expected = reference_logits(model)
    pack_linear_layers(model)
    use_slab_attention(model)
    hooks = SteeringHooks(model, loaded.lm_head)
    runner = Runner(model, hooks)
    check_forward(model, runner, expected)
    check_lm_head(model, runner, loaded.description.head_width)
    interventions = LoadedInterventions(
        options.max_loaded_interventions,
        loaded.description,
        hooks,
        model.device,
        probe=partial(dead_sites, model, runner, widths=loaded.description.site_widths),
    )
    pool = _block_pool(SlabShape.of(model), options)
    prefixes = PrefixCache[list[Tensor]](pool, options.prefix_cache)
    scheduler = Scheduler(
        pool=pool,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_waiting=options.max_waiting,
        prefill_tokens=options.prefill_tokens or _PREFILL_TOKENS[model.device.type],
        find=prefixes.find,
    )
    return EngineCore(
        model,
        loaded.tokenizer,
        _compiled_runner(loaded, hooks, runner, options) if options.compile_layers else runner,
        scheduler,
        prefixes,
        interventions,
        _eos_tokens(loaded),
        options.check_invariants,
        options.dose_interval,
    )


def _compiled_runner(
    loaded: LoadedModel, hooks: SteeringHooks, eager: Runner, options: EngineOptions
) -> Runner:
    """A runner whose layers are compiled in the background."""
    model, widths = loaded.model, loaded.description.site_widths
    if model.device.type != "cpu":
        return eager
    layers = DecoderLayers(model)
    more_tokens, one_token = record_layers(model, layers, eager)
    compiled = CompiledLayers(layers, one_token, more_tokens)
    with suppress(SiteError):  # not every architecture has default sites
        sites = match_sites(default_sites(loaded.description.architecture), widths)
        compiled.expect(
            {site: widths[site] for site in sites}, options.max_loaded_interventions + 1
        )
    return Runner(model, hooks, compiled)


def context_length(loaded: LoadedModel, options: EngineOptions, pool: BlockPool) -> int:
    """The longest prompt and completion that can be served, in tokens."""
    config = loaded.model.config.get_text_config()
    limits: list[int] = [config.max_position_embeddings, pool.tokens]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it the frequencies depend on the longest sequence in the batch: a request's
        # result would depend on its neighbours.
        limits.append(rope["original_max_position_embeddings"])
    if options.max_model_len is not None:
        if options.max_model_len > config.max_position_embeddings:
            raise ModelLoadError(
                f"max_model_len {options.max_model_len} exceeds the model's "
                f"{config.max_position_embeddings} positions"
            )
        limits.append(options.max_model_len)
    return min(limits)


def _block_pool(shape: SlabShape, options: EngineOptions) -> BlockPool:
    """As many blocks as the memory for keys and values holds."""
    if options.kv_cache_gb is not None:
        blocks = int(options.kv_cache_gb * 1e9) // (shape.bytes_per_token * _BLOCK_SIZE)
    else:
        # A block is spread over all layers, so the tightest device decides.
        layers = Counter(shape.devices)
        blocks = min(
            int(free_memory(device) * _DEFAULT_KV_SHARE[device.type])
            // (count * shape.bytes_per_token_and_layer * _BLOCK_SIZE)
            for device, count in layers.items()
        )
    if blocks < 1:
        raise ModelLoadError("the memory for keys and values does not hold a single block")
    return BlockPool(blocks, _BLOCK_SIZE)


def _eos_tokens(loaded: LoadedModel) -> frozenset[int]:
    generation = loaded.model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = loaded.tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
