"""The options of the engine on vLLM that an operator may choose."""

from dataclasses import dataclass

from server.engine.templates import OWN_TEMPLATES, Templates
from server.engine.vllm.plugin.wire import Runner


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Says how vLLM is started, and what is prepared in its workers."""

    max_batch_size: int = 64  # sequences running at once
    max_batch_tokens: int = 512  # tokens in one step
    max_waiting: int = 256
    max_model_len: int | None = None  # None: the model's own
    kv_cache_gb: float | None = (
        None  # None: a quarter of a CPU's free memory, vLLM's choice on GPUs
    )
    max_loaded_interventions: int = 64
    prefix_cache: bool = True
    dose_interval: int = 16  # edits are measured in one of so many steered steps; 0: never
    templates: Templates = OWN_TEMPLATES
    sites: tuple[str, ...] = ()  # regular expressions over module paths, beside the default sites
    vllm_args: str = ""  # vLLM's own options, as on its command line
    runner: Runner = "v1"  # as `prepare_environment` was told
