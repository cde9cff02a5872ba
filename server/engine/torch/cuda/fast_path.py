"""Makes the engine fast on a GPU: kernels for the edits, decoding by replayed CUDA graphs."""

from contextlib import suppress

from transformers import PreTrainedModel

from server.engine.errors import UnservableInterventionError
from server.engine.probes import complete_map
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.cuda.affine_check import use_affine_kernel
from server.engine.torch.cuda.capture import CudaCapture
from server.engine.torch.cuda.graphs import GraphRunner
from server.engine.torch.cuda.grouped_check import make_grouped_refinement
from server.engine.torch.fast_paths import EngineParts
from server.engine.torch.model.devices import is_spread
from server.engine.torch.model.fallback import fall_back
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.runner import Runner
from steering.sites import SiteError, default_sites, match_sites


def prepare(model: PreTrainedModel, options: EngineOptions) -> None:
    """Leave the model as it is."""


def faster_runner(parts: EngineParts, options: EngineOptions) -> Runner:
    """Make a runner that replays graphs; return `parts.eager_runner` where there can be no graphs.

    Raises:
        ModelLoadError: the device has failed, and computes nothing any more.
    """
    model, memory = parts.loaded.model, parts.kv.memory
    _use_kernels(parts)
    if not options.cuda_graphs or not isinstance(memory, PagedMemory) or _has_changing_rope(model):
        return parts.eager_runner
    graphs = GraphRunner(
        model,
        parts.hooks,
        memory,
        options.max_batch_size,
        parts.context_length,
        CudaCapture(memory.device),
        parts.interventions.bank,
    )
    try:
        graphs.warm_up()
        _rehearse(graphs, parts)
    except Exception as error:
        fall_back(
            error,
            memory.device,
            "the making of CUDA graphs (--no-cuda-graphs does without)",
            "steps run without CUDA graphs, which is slower, as with --no-cuda-graphs",
        )
        return parts.eager_runner
    return graphs


def _use_kernels(parts: EngineParts) -> None:
    """Make kernels compute the edits, unless a check finds them wrong."""
    model, description = parts.loaded.model, parts.loaded.description
    bank = parts.interventions.bank
    use_affine_kernel(description.hidden_size, model.dtype, model.device)
    if not is_spread(model):  # a spread model may need a head on another device
        bank.grouped = make_grouped_refinement(bank.slots + 1, description.head_width, model.device)


def _rehearse(graphs: GraphRunner, parts: EngineParts) -> None:
    """Make the graphs for one affine edit at the default sites, before a request needs them.

    The edit has a support and a gate, so that the graphs serve any map at these sites.
    """
    description = parts.loaded.description
    # Some architectures have no default sites, and an edit at some sites may not reach the logits.
    with suppress(SiteError, UnservableInterventionError):
        sites = match_sites(default_sites(description.architecture), description.site_widths)
        maps = {site: complete_map(description.site_widths[site]) for site in sites}
        with parts.interventions.temporarily_installed(maps) as slot:
            graphs.warm_up(slot)


def _has_changing_rope(model: PreTrainedModel) -> bool:
    """Return whether the host changes rotary frequencies with the longest sequence's length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return any(kind in repr(rope) for kind in ("dynamic", "longrope"))
