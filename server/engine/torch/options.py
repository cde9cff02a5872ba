"""The options of the torch engine that an operator may choose."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from server.engine.templates import OWN_TEMPLATES, Templates

AttentionChoice: TypeAlias = Literal["automatic", "pages", "slabs"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Says how the engine is built, and how much it computes at once."""

    max_batch_size: int = 64  # sequences running at once
    max_batch_tokens: int = 512  # tokens in one step
    max_waiting: int = 256
    max_model_len: int | None = None  # None: the model's own
    kv_cache_gb: float | None = None  # None: a share of the device's free memory
    max_loaded_interventions: int = 64
    # On a CPU: compile layers in the background.
    compile_layers: bool = False
    # With `compile_layers`: compile each mix of edits when it is first used, not when it recurs.
    compile_at_once: bool = False
    attention: AttentionChoice = "automatic"  # how keys and values are stored and attended over
    cuda_graphs: bool = True  # on a GPU with paged attention, steps that only decode are replayed
    prefix_cache: bool = True  # keep computed blocks for prompts that begin with the same tokens
    prefill_tokens: int | None = None  # most prompt tokens in a step that decodes too
    check_invariants: bool = False  # after every step; a debugging aid
    dose_interval: int = 16  # edits are measured in one of so many steered steps; 0: never
    templates: Templates = OWN_TEMPLATES
