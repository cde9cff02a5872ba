"""What an operator may choose of the torch engine."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

AttentionChoice: TypeAlias = Literal["automatic", "pages", "slabs"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine is built, and how much it takes on at once."""

    max_batch_size: int = 64  # sequences running at once
    max_batch_tokens: int = 512  # tokens of one step
    max_waiting: int = 256
    max_model_len: int | None = None  # None: the model's own
    kv_cache_gb: float | None = None  # None: what is left, see `memory_plan`
    max_loaded_interventions: int = 64
    compile_layers: bool = False  # on a CPU: layers, in the background; what refines, at start
    compile_at_once: bool = False  # layers for any mix of edits, from its first step on: to measure
    attention: AttentionChoice = "automatic"  # where keys and values are kept, and so who attends
    cuda_graphs: bool = True  # steps that only decode are replayed, on a GPU with paged attention
    prefix_cache: bool = True  # computed blocks are kept for whoever begins with the same tokens
    prefill_tokens: int | None = None  # None: by device, see `build`
    check_invariants: bool = False  # after every step; a debugging aid
    dose_interval: int = 16  # edits are measured in one of so many steered steps; 0 for never
