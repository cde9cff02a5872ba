"""Which ways of running vLLM are refused. The configurations are vLLM's in shape only."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.vllm.plugin.limits import UnsupportedSetupError, refuse_unsupported
from server.engine.vllm.plugin.wire import Layout, WireError

PLAIN: dict[str, Any] = {
    "additional_config": Layout(1, ()).to_config(),
    "use_v2_model_runner": False,
    "speculative_config": None,
    "lora_config": None,
    "kv_transfer_config": None,
    "ec_transfer_config": None,
    "weight_transfer_config": None,
    "watermark_config": None,
    "cache_config.kv_sharing_fast_prefill": False,
    "compilation_config.inductor_compile_config": {"dce": True},
    "model_config.architecture": "LlamaForCausalLM",
    "model_config.enable_sleep_mode": False,
    "model_config.enable_prompt_embeds": False,
    "model_config.uses_mrope": False,
    "model_config.runner_type": "generate",
    "model_config.logprobs_mode": "raw_logprobs",
    "parallel_config.data_parallel_size": 1,
    "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "parallel_config.enable_batch_sharded_sampling": None,
    "parallel_config.enable_eplb": False,
}


def config_with(**changes: object) -> SimpleNamespace:
    """Return a configuration; a change of "a.b" is given as a__b."""
    config = SimpleNamespace()
    values = PLAIN | {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in values.items():
        *parents, last = name.split(".")
        place = config
        for parent in parents:
            if not hasattr(place, parent):
                setattr(place, parent, SimpleNamespace())
            place = getattr(place, parent)
        setattr(place, last, value)
    return config


def test_a_plain_setup_is_taken() -> None:
    refuse_unsupported(config_with())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_v2_model_runner": True}, "runner v2, where --vllm-runner v1 was chosen"),
        (
            {"additional_config": Layout(1, (), "v2").to_config()},
            "runner v1, where --vllm-runner v2 was chosen",
        ),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"weight_transfer_config": object()}, "weight transfer"),
        ({"watermark_config": object()}, "watermarks"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"compilation_config__inductor_compile_config": {"max_autotune": True}}, "max_autotune"),
        ({"compilation_config__inductor_compile_config": {"freezing": True}}, "freezing"),
        ({"model_config__architecture": "MambaForCausalLM"}, "MambaForCausalLM; it does with"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode"),
        ({"model_config__enable_prompt_embeds": True}, "prompt embeddings"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"model_config__runner_type": "pooling"}, "a pooling model"),
        ({"model_config__logprobs_mode": "processed_logprobs"}, "processed_logprobs"),
        ({"parallel_config__data_parallel_size": 2}, "several servers on one registry"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_ubatching": True}, "dual-batch overlap"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded-sampling"),
        ({"parallel_config__enable_eplb": True}, "expert load balancing"),
    ],
)
def test_what_steering_was_not_shown_with_is_refused_by_name(
    changes: dict[str, object], told: str
) -> None:
    with pytest.raises(UnsupportedSetupError, match=told):
        refuse_unsupported(config_with(**changes))


def test_a_vllm_that_others_started_is_refused() -> None:
    with pytest.raises(WireError, match="start it by steerserve"):
        refuse_unsupported(config_with(additional_config={}))
