"""Puts a loaded model's engine together, and tests it on the model before anything is served."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from server.engine.base import UnservableInterventionError
from server.engine.torch.attention import use_engine_attention
from server.engine.torch.compiled import CompiledLayers
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda_graphs import GraphRunner
from server.engine.torch.decoder import DecoderLayers
from server.engine.torch.graph_capture import CudaCapture
from server.engine.torch.interventions import LoadedInterventions
from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.kv_plan import KVPlan, KVWishes, plan_kv
from server.engine.torch.loader import LoadedModel, ModelLoadError
from server.engine.torch.native_refinement import make_native_refinement
from server.engine.torch.packed import pack_linear_layers
from server.engine.torch.paged_attention import PagedMemory
from server.engine.torch.prefix_cache import PrefixCache
from server.engine.torch.runner import Runner
from server.engine.torch.scheduler import Scheduler
from server.engine.torch.self_test import (
    check_forward,
    check_lm_head,
    dead_sites,
    probe_map,
    record_layers,
    reference_logits,
)
from server.engine.torch.slab import SlabShape
from server.engine.torch.slab_attention import SlabMemory
from server.engine.torch.staged_runner import StagedRunner
from steering.hooks import SteeringHooks
from steering.sites import SiteError, default_sites, match_sites

# Of prompts, in a step that others wait for to get their next token: about as long as the rest.
_PREFILL_TOKENS = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an operator may choose of the torch engine."""

    max_batch_size: int = 64  # sequences running at once
    max_batch_tokens: int = 512  # tokens of one step
    max_waiting: int = 256
    max_model_len: int | None = None  # None: the model's own
    kv_cache_gb: float | None = None  # None: a share of what is free, see `kv_plan`
    max_loaded_interventions: int = 64
    compile_layers: bool = False  # on a CPU: layers, in the background; what refines, at start
    cuda_graphs: bool = True  # steps that only decode are replayed, on a GPU whose torch can
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
    pack_linear_layers(model, will_compile=options.compile_layers)
    use_engine_attention(model)
    hooks = SteeringHooks(model, loaded.lm_head)
    kv = plan_kv(model, KVWishes(options.kv_cache_gb, options.max_batch_size, options.prefix_cache))
    memory = kv.memory
    paged = memory if isinstance(memory, PagedMemory) else None
    runner = Runner(model, hooks) if paged is None else StagedRunner(model, hooks, model.device)
    check_forward(model, runner, memory, expected)
    check_lm_head(model, runner, memory, loaded.description.head_width)
    interventions = LoadedInterventions(
        options.max_loaded_interventions,
        loaded.description,
        hooks,
        model.device,
        probe=partial(dead_sites, model, runner, memory, widths=loaded.description.site_widths),
    )
    prefixes = PrefixCache[list[Tensor]](kv.prefixes, options.prefix_cache)
    scheduler = Scheduler(
        pool=kv.pool,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_waiting=options.max_waiting,
        prefill_tokens=options.prefill_tokens or _PREFILL_TOKENS[model.device.type],
        find=prefixes.find,
    )
    return EngineCore(
        model,
        loaded.tokenizer,
        _faster_runner(loaded, hooks, runner, kv, interventions, options),
        scheduler,
        memory,
        prefixes,
        interventions,
        _eos_tokens(loaded),
        options.check_invariants,
        options.dose_interval,
    )


def _faster_runner(
    loaded: LoadedModel,
    hooks: SteeringHooks,
    eager: Runner,
    kv: KVPlan,
    interventions: LoadedInterventions,
    options: EngineOptions,
) -> Runner:
    """A runner that makes what it can ahead of the steps, or the one given."""
    model, memory = loaded.model, kv.memory
    if isinstance(memory, PagedMemory):
        if memory.form.gathers or not options.cuda_graphs or _has_changing_rope(model):
            return eager
        length = context_length(loaded, options, kv.pool)
        capture = CudaCapture(memory.device)
        graphs = GraphRunner(model, hooks, memory, options.max_batch_size, length, capture)
        graphs.warm_up(interventions.bank)
        _rehearse(graphs, interventions, loaded, options)
        return graphs
    if options.compile_layers and model.device.type == "cpu":
        compiled = _compiled_layers(loaded, eager, options)
        interventions.bank.native = make_native_refinement()
        return Runner(model, hooks, compiled)
    return eager


def _rehearse(
    graphs: GraphRunner,
    interventions: LoadedInterventions,
    loaded: LoadedModel,
    options: EngineOptions,
) -> None:
    """Have graphs made for one affine edit at the default sites, before anybody wants it."""
    widths = loaded.description.site_widths
    # Not every architecture has default sites, and at some an edit may reach nothing.
    with suppress(SiteError, UnservableInterventionError):
        sites = match_sites(default_sites(loaded.description.architecture), widths)
        with interventions.rehearsed({site: probe_map(widths[site]) for site in sites}) as slot:
            graphs.warm_up(interventions.bank, slot)
            if options.dose_interval:
                graphs.warm_up(interventions.bank, slot, measured=True)


def _has_changing_rope(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies depend on the longest sequence, which the host looks up."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return any(kind in repr(rope) for kind in ("dynamic", "longrope"))


def _compiled_layers(loaded: LoadedModel, eager: Runner, options: EngineOptions) -> CompiledLayers:
    """The layers, compiled in the background."""
    model, widths = loaded.model, loaded.description.site_widths
    # Of its own, as the probes keep theirs: they are computed again with each graph.
    memory = SlabMemory(SlabShape.of(model))
    layers = DecoderLayers(model)
    more_tokens, one_token = record_layers(model, layers, eager, memory)
    compiled = CompiledLayers(layers, one_token, more_tokens, loaded.lm_head)
    with suppress(SiteError):  # not every architecture has default sites
        sites = match_sites(default_sites(loaded.description.architecture), widths)
        compiled.expect(
            {site: widths[site] for site in sites}, options.max_loaded_interventions + 1
        )
    return compiled


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


def _eos_tokens(loaded: LoadedModel) -> frozenset[int]:
    generation = loaded.model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = loaded.tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
