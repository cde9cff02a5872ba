"""Makes the engine fast on a CPU: packed weights and compiled layers."""

from contextlib import suppress

from transformers import PreTrainedModel

from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.cpu.compiled import CompiledLayers
from server.engine.torch.cpu.graph_store import RECURRENCE
from server.engine.torch.cpu.packed import pack_linear_layers
from server.engine.torch.cpu.recurring import RecurrenceRule
from server.engine.torch.fast_paths import EngineParts
from server.engine.torch.options import EngineOptions
from server.engine.torch.self_test import record_layers
from server.engine.torch.step.decoder import DecoderLayers
from server.engine.torch.step.runner import Runner
from steering.sites import SiteError, default_sites, match_sites


def prepare(model: PreTrainedModel, options: EngineOptions) -> None:
    """Pack the weights of linear layers into the layout that the CPU reads fastest."""
    pack_linear_layers(model, will_compile=options.compile_layers)


def faster_runner(parts: EngineParts, options: EngineOptions) -> Runner:
    """Return a runner whose layers are compiled in the background.

    It is the eager runner if the options do not ask for compiled layers.
    """
    if not options.compile_layers:
        return parts.eager_runner
    return Runner(parts.loaded.model, parts.hooks, _compiled_layers(parts, options))


def _compiled_layers(parts: EngineParts, options: EngineOptions) -> CompiledLayers:
    loaded = parts.loaded
    model, widths = loaded.model, loaded.description.site_widths
    # The steps are recorded in a K/V memory of their own. They keep their keys and values there for
    # good, because each new graph is checked by repeating them.
    memory = SlabMemory(KVShape.of(model))
    layers = DecoderLayers(model)
    more_tokens, one_token = record_layers(model, layers, parts.eager_runner, memory)
    rule = RecurrenceRule.at_once() if options.compile_at_once else RECURRENCE
    compiled = CompiledLayers(layers, one_token, more_tokens, loaded.lm_head, rule)
    with suppress(SiteError):  # not every architecture has default sites
        sites = match_sites(default_sites(loaded.description.architecture), widths)
        compiled.precompile(
            {site: widths[site] for site in sites}, options.max_loaded_interventions + 1
        )
    return compiled
