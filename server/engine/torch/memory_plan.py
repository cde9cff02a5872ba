"""Divides a GPU's memory before it is allocated: interventions, a step, graphs, keys and values.

The numbers are estimates from a model's configuration, on the high side. `make gpu-check` compares
them with what a GPU has used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedModel

from server.engine.torch.model.devices import free_memory
from server.engine.torch.options import EngineOptions
from server.engine.torch.step.graph_keys import MAX_DEPTH, buckets
from steering.sites import SiteError, default_sites, match_sites

# Hidden units of a reward head in the paper (ARGRE, NeurIPS 2025); others may have more.
_HEAD_UNITS: Final = 1024
_FLOAT_BYTES: Final = 4  # bytes
# Bytes for each logit of a row that draws: in the model's dtype, in float32, penalised, divided by
# the temperature, as a weight, as a weight in fixed point, and in the cumulative sum.
_LOGIT_BYTES: Final = 40
# Bytes of one captured graph: its kernel launches in all layers together.
_GRAPH_BYTES: Final = 24 << 20
# One graph without edits, and one for each depth of the stacks of affine edits.
_GRAPHS_PER_BUCKET: Final = 1 + MAX_DEPTH
# Bytes that the device's libraries take for themselves, and that lie between allocations.
_LIBRARIES: Final = 512 << 20
_USABLE: Final = 0.97  # share of the free memory that the plan divides


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Divides the memory of one GPU that the weights leave free, in bytes."""

    free: int  # when the plan was made
    bank: int  # interventions that are loaded
    step: int  # activations and logits of the largest step
    graphs: int  # captured steps
    libraries: int

    @property
    def keys_and_values(self) -> int:
        """Bytes left for keys and values; negative if there is not enough for the other parts."""
        rest = self.bank + self.step + self.graphs + self.libraries
        return int(self.free * _USABLE) - rest

    def summary(self) -> str:
        """Return a sentence for the log that says what the memory is for."""
        parts = {
            "interventions": self.bank,
            "a step": self.step,
            "graphs": self.graphs,
            "libraries": self.libraries,
            "keys and values": self.keys_and_values,
        }
        shown = ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items())
        return f"of {self.free / 1e9:.2f} GB free: {shown}"


def plan_memory(
    model: PreTrainedModel, widths: Mapping[str, int], options: EngineOptions
) -> MemoryPlan:
    """Plan the memory of the GPU that a model is on.

    Args:
        widths: site -> width of its activations.
    """
    graphs = len(buckets(options.max_batch_size)) * _GRAPHS_PER_BUCKET
    return MemoryPlan(
        free=free_memory(model.device),
        bank=_bank_bytes(model, widths, options.max_loaded_interventions),
        step=_step_bytes(model, options),
        graphs=graphs * _GRAPH_BYTES if options.cuda_graphs else 0,
        libraries=_LIBRARIES,
    )


def _bank_bytes(model: PreTrainedModel, widths: Mapping[str, int], slots: int) -> int:
    """Return the bytes of a full bank.

    Every slot is assumed to hold a reward head and, at each default site, a map with a support and
    a gate.
    """
    try:
        sites = match_sites(default_sites(type(model).__name__), widths)
    except SiteError:  # not every architecture has default sites
        sites = ()
    # Weight, bias, the two ends of the support, and the gate's weight and bias.
    maps = sum(5 * widths[site] + 1 for site in sites)
    width: int = model.config.get_text_config().hidden_size
    head = _HEAD_UNITS * (width + _HEAD_UNITS + 3)  # W1, W1 W1^T, and vectors
    return (slots + 1) * (maps + head) * _FLOAT_BYTES


def _step_bytes(model: PreTrainedModel, options: EngineOptions) -> int:
    """Return the bytes of the largest step's logits and of one layer's activations.

    Activations are counted in the model's dtype and, while they are edited, in float32.
    """
    config = model.config.get_text_config()
    width: int = config.hidden_size
    vocabulary: int = config.vocab_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * width
    token = (6 * width + 3 * inner) * model.dtype.itemsize + 4 * width * _FLOAT_BYTES
    drawn = options.max_batch_size * _LOGIT_BYTES
    scored = options.max_batch_tokens * (model.dtype.itemsize + _FLOAT_BYTES)
    return options.max_batch_tokens * token + (drawn + scored) * vocabulary
