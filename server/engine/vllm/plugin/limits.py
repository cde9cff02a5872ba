"""Refuses every way of running vLLM with which steering was not shown to work."""

from collections.abc import Iterator
from typing import Any, Final

from server.engine.vllm.plugin.sites import ARCHITECTURES
from server.engine.vllm.plugin.wire import Layout, Runner

_FREEZING: Final = ("freezing", "max_autotune")  # may fold the edits' tensors into compiled code


class UnsupportedSetupError(ValueError):
    """vLLM is set up in a way with which it is not steered; the message says which."""


def refuse_unsupported(config: Any) -> None:
    """Check a `VllmConfig`, in the service before vLLM starts and in every worker.

    Raises:
        UnsupportedSetupError: the first setting that is not supported.
        WireError: vLLM was not started by the service.
    """
    layout = Layout.from_config(config.additional_config)
    for found in _unsupported(config, layout.runner):
        raise UnsupportedSetupError(f"steering inside vLLM does not work with {found}")


def _unsupported(config: Any, chosen: Runner) -> Iterator[str]:
    """Yield each setting that is not supported, as the end of a sentence."""
    used: Runner = "v2" if config.use_v2_model_runner else "v1"
    if used != chosen:
        yield f"vLLM's model runner {used}, where --vllm-runner {chosen} was chosen"
    yield from _unsupported_model(config)
    yield from _unsupported_parallelism(config.parallel_config)
    features = {
        "speculative decoding": config.speculative_config,
        "LoRA": config.lora_config,
        "a KV connector": config.kv_transfer_config,
        "an encoder connector": config.ec_transfer_config,
        "weight transfer": config.weight_transfer_config,
        "watermarks": config.watermark_config,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    yield from (name for name, is_on in features.items() if is_on)
    inductor = config.compilation_config.inductor_compile_config
    yield from (f"Inductor's {name}" for name in _FREEZING if inductor.get(name))


def _unsupported_model(config: Any) -> Iterator[str]:
    model = config.model_config
    if model.architecture not in ARCHITECTURES:
        yield f"{model.architecture}; it does with {', '.join(ARCHITECTURES)}"
    features = {
        "sleep mode": model.enable_sleep_mode,
        "prompt embeddings": model.enable_prompt_embeds,
        "M-RoPE": model.uses_mrope,
        "a pooling model": model.runner_type != "generate",
        f"--logprobs-mode {model.logprobs_mode}": model.logprobs_mode != "raw_logprobs",
    }
    yield from (name for name, is_on in features.items() if is_on)


def _unsupported_parallelism(parallel: Any) -> Iterator[str]:
    features = {
        "data parallelism: start several servers on one registry": parallel.data_parallel_size > 1,
        "context parallelism": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "dual-batch overlap": parallel.use_ubatching,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "expert load balancing": parallel.enable_eplb,
    }
    yield from (name for name, is_on in features.items() if is_on)
