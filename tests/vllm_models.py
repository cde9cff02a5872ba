"""Tiny models that vLLM's CPU build can run, and vLLM itself around them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from interventions.layout import to_tensors
from server.engine.vllm.plugin.sites import chosen_sites
from server.engine.vllm.plugin.wire import Layout, LoadedEdit, Runner, Steering
from steering.affine import AffineParameters
from steering.reward import RewardHead
from steering.sites import default_sites
from tests.tiny import LAYERS, tiny_config, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gpt2", "opt", "opt-350m")
_HEAD_SIZE = 32  # the smallest that vLLM's attention on a CPU has
_SLOTS = 4
_WORKERS: dict[Runner, str] = {
    "v1": "server.engine.vllm.plugin.cpu_worker.SteeredCPUWorker",
    "v2": "server.engine.vllm.plugin.v2.cpu_worker.SteeredV2CPUWorker",
}


def vllm_config(family: str) -> PreTrainedConfig:
    """Return a family's tiny configuration without what vLLM's own model of it refuses."""
    config = tiny_config(family)
    match family:
        case "gpt2" | "opt" | "opt-350m":
            config.num_attention_heads = 1
            config.scale_attn_by_inverse_layer_idx = False
        case "qwen2":
            config.num_attention_heads = 1
            config.use_sliding_window, config.sliding_window = False, None
            config.layer_types = ["full_attention"] * LAYERS
        case "gemma2":
            config.head_dim = _HEAD_SIZE
            config.tie_word_embeddings = True
        case _:
            config.head_dim = _HEAD_SIZE
    return config


def vllm_model(family: str) -> PreTrainedModel:
    """Return transformers' model, for the oracle."""
    return tiny_model(family, config=vllm_config(family))


@contextmanager
def steered_vllm(
    family: str, folder: Path, *, steered: bool = True, runner: Runner = "v1", **options: Any
) -> Iterator[Any]:
    """Start vLLM in this process, steered at the family's default sites, or as it is.

    `runner` is the one that the process was prepared for.

    Yields vLLM's `LLM`.
    """
    # By name, because the tests that need none of it run where there is no vLLM.
    from vllm import LLM  # noqa: PLC0415
    from vllm.distributed import cleanup_dist_env_and_memory, parallel_state  # noqa: PLC0415
    from vllm.model_executor.models import registry  # noqa: PLC0415

    # The end of one vLLM takes the process's groups of ranks from every other.
    assert not parallel_state.model_parallel_is_initialized(), "another vLLM lives in this process"
    model = vllm_model(family)
    model.save_pretrained(folder)
    architecture = type(model).__name__
    sites = chosen_sites(architecture, LAYERS, [default_sites(architecture)], [])
    plugin = {
        "worker_cls": _WORKERS[runner],
        "additional_config": Layout(_SLOTS, sites, runner).to_config(),
    }
    # vLLM looks at a model's class in another process, for which it imports all of itself again, so
    # that this process touches no GPU.
    with patch.object(registry, "_run_in_subprocess", lambda call: call()):
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=256,
            **{
                "kv_cache_memory_bytes": 16 << 20,
                "max_num_seqs": 32,
                "max_num_batched_tokens": 64,
                "enforce_eager": True,
                **options,
            },
            **(plugin if steered else {}),
        )
    try:
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()


@contextmanager
def recorded_logits(llm: Any) -> Iterator[list[Tensor]]:
    """Within the context, record the logits of every step of a vLLM in this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    recorded: list[Tensor] = []

    def record(_module: nn.Module, _args: object, logits: Tensor) -> None:
        recorded.append(logits.clone())

    processor = worker.model_runner.get_model().get_submodule("logits_processor")
    handle = processor.register_forward_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()


@contextmanager
def vllm_in_this_process(cache: Path, runner: Runner = "v1") -> Iterator[None]:
    """Within the context, vLLM starts without other processes; it reads the environment for that.

    The engine on vLLM, whose tests may come next, must not find these variables.
    """
    variables = {
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
    }
    with patch.dict(os.environ, variables):
        yield


def artifact_bytes(parameters: AffineParameters | RewardHead) -> bytes:
    """Return the bytes of an artifact, without a manifest."""
    tensors = {name: tensor.clone() for name, tensor in to_tensors(parameters).items()}
    return safetensors.torch.save(tensors)


def load_all(llm: Any, interventions: Mapping[str, AffineParameters | RewardHead]) -> list[str]:
    """Load interventions into the slots from 1 on; return their digests by slot, from slot 0."""
    for slot, (digest, parameters) in enumerate(interventions.items(), start=1):
        llm.collective_rpc("steering_load", args=(slot, digest, artifact_bytes(parameters)))
    return ["", *interventions]


def steering_args(
    edits: Sequence[tuple[str, Any]], slots: Sequence[str], seed: int | None = None
) -> dict[str, Any]:
    """Return the `extra_args` of a request with edits by digest."""
    loaded = (LoadedEdit(slots.index(digest), digest, settings) for digest, settings in edits)
    return Steering(tuple(loaded), seed).to_extra_args()
