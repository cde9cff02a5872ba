"""Builds the engine for a loaded model, and tests it on that model before anything is served."""

import logging
from functools import partial

from torch import Tensor

from server.engine.model.description import ModelLoadError
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.attention.plan import KVOptions, plan_kv
from server.engine.torch.attention.transformers_hook import use_engine_attention
from server.engine.torch.core import EngineCore
from server.engine.torch.fast_paths import EngineParts, fast_path_of
from server.engine.torch.loaded_interventions import LoadedInterventions
from server.engine.torch.memory_plan import plan_memory
from server.engine.torch.model.devices import is_spread
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Scheduler
from server.engine.torch.self_test import (
    check_forward,
    check_lm_head,
    dead_sites,
    reference_logits,
    sites_per_batch,
)
from server.engine.torch.site_probes import SiteProbes
from server.engine.torch.step.runner import Runner
from server.engine.torch.step.staged_runner import StagedRunner
from steering.hooks import SteeringHooks

logger = logging.getLogger(__name__)

# Prompt tokens in a step that also decodes: their prefill takes about as long as the rest of it.
_PREFILL_TOKENS = {"cpu": 64, "cuda": 512}


def build_core(loaded: LoadedModel, options: EngineOptions) -> EngineCore:
    """Build the engine's core, and run its self-test on the model.

    Raises:
        ModelLoadError: the engine's logits differ from the model's, or an edit would not reach
            the logits.
    """
    model, widths = loaded.model, loaded.description.site_widths
    fast_path = fast_path_of(model.device)
    expected = reference_logits(model)
    fast_path.prepare(model, options)
    use_engine_attention(model)
    hooks = SteeringHooks(model, loaded.lm_head)
    kv = plan_kv(model, _kv_options(loaded, options))
    memory = kv.memory
    paged = memory if isinstance(memory, PagedMemory) else None
    runner = Runner(model, hooks) if paged is None else StagedRunner(model, hooks, model.device)
    check_forward(model, runner, memory, expected)
    check_lm_head(model, runner, memory, loaded.description.head_width)
    probe = partial(dead_sites, model, runner, memory, widths=widths)
    interventions = LoadedInterventions(
        options.max_loaded_interventions,
        loaded.description,
        model.device,
        SiteProbes(hooks, probe, sites_per_batch(memory)),
    )
    prefixes = PrefixCache[list[Tensor]](kv.prefixes, options.prefix_cache)
    scheduler = Scheduler(
        pool=kv.pool,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_waiting=options.max_waiting,
        prefill_tokens=options.prefill_tokens or _PREFILL_TOKENS[model.device.type],
        find_cached=prefixes.find,
    )
    length = context_length(loaded, options, kv.pool)
    return EngineCore(
        model,
        loaded.tokenizer,
        fast_path.faster_runner(
            EngineParts(loaded, hooks, runner, kv, interventions, length), options
        ),
        scheduler,
        memory,
        prefixes,
        interventions,
        loaded.eos_tokens,
        options.check_invariants,
        options.dose_interval,
    )


def _kv_options(loaded: LoadedModel, options: EngineOptions) -> KVOptions:
    """Return the operator's choices for the K/V memory.

    On a single GPU, if no size was given, the size is what the memory plan leaves.
    """
    given = options.kv_cache_gb
    size = None if given is None else int(given * 1e9)
    model = loaded.model
    if size is None and model.device.type == "cuda" and not is_spread(model):
        plan = plan_memory(model, loaded.description.site_widths, options)
        logger.info("memory of the GPU: %s", plan.summary())
        size = plan.keys_and_values
    return KVOptions(options.attention, options.prefix_cache, size)


def context_length(loaded: LoadedModel, options: EngineOptions, pool: BlockPool) -> int:
    """Return how many tokens a prompt and its completion may have together."""
    config = loaded.model.config.get_text_config()
    limits: list[int] = [config.max_position_embeddings, pool.capacity]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length the frequencies depend on the longest sequence in the batch, so a
        # request's result would depend on its neighbours.
        limits.append(rope["original_max_position_embeddings"])
    if options.max_model_len is not None:
        if options.max_model_len > config.max_position_embeddings:
            raise ModelLoadError(
                f"max_model_len {options.max_model_len} exceeds the model's "
                f"{config.max_position_embeddings} positions"
            )
        limits.append(options.max_model_len)
    return min(limits)
