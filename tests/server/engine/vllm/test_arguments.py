"""What vLLM is started with, and what it refuses: `make test-vllm`."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server.config import ConfigurationError
from server.engine.vllm.environment import prepare_environment
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.wire import Layout
from tests.tiny import tiny_tokenizer
from tests.vllm_models import vllm_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
OPTIONS = VllmOptions(max_batch_size=8, max_batch_tokens=64, max_model_len=100, kv_cache_gb=0.02)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prepare_environment("v1")
    from server.engine.vllm.served_model import describe_served_model  # noqa: PLC0415

    folder: Path = tmp_path_factory.mktemp("model")
    vllm_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return describe_served_model(str(folder), "float32", OPTIONS, [], lambda _sentence: None)


def config_of(served: Any, options: VllmOptions = OPTIONS) -> Any:
    from server.engine.vllm.arguments import vllm_config  # noqa: PLC0415  where vLLM is

    return vllm_config(served, options)


def test_the_options_reach_vllm(served: Any) -> None:
    config = config_of(served, replace(OPTIONS, vllm_args="--block-size 64 --enforce-eager"))
    assert config.scheduler_config.max_num_seqs == 8
    assert config.scheduler_config.max_num_batched_tokens == 64
    assert config.scheduler_config.policy == "priority"
    assert config.model_config.max_model_len == 101
    assert config.model_config.enforce_eager
    assert config.cache_config.block_size == 64
    assert config.cache_config.kv_cache_memory_bytes == 20_000_000
    assert config.cache_config.enable_prefix_caching
    assert Layout.from_config(config.additional_config) == served.layout


def test_the_prefix_cache_can_be_left_out(served: Any) -> None:
    config = config_of(served, replace(OPTIONS, prefix_cache=False))
    assert not config.cache_config.enable_prefix_caching


def test_draws_without_a_seed_differ_from_start_to_start(served: Any) -> None:
    first, second = config_of(served), config_of(served)
    assert first.model_config.seed != second.model_config.seed
    assert first.compute_hash() == second.compute_hash()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--worker-cls other.Worker", "--worker-cls is not an option for --vllm-args"),
        ("--max_model_len=5", "--max-model-len is not an option for --vllm-args"),
        ("--worker-cl other.Worker", "not shown to work with --worker-cl;"),  # argparse takes it
        ("--no-such-option 3", "--no-such-option"),
        ("--block-size many", "many"),
        ("--enable-sleep-mode", "not shown to work with --enable-sleep-mode;"),
        ("--hf-overrides {}", "not shown to work with --hf-overrides;"),
        ("-dp 2", "not shown to work with -dp;"),
        ("-cc.inductor_compile_config.freezing=true", "freezing"),
        ("--block-size 'x", "No closing quotation"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(served: Any, given: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        config_of(served, replace(OPTIONS, vllm_args=given))


@pytest.mark.parametrize(
    ("variable", "told"),
    [("1", "Model Runner V2 requires Triton"), ("0", "runner v1, where --vllm-runner v2 was")],
)
def test_the_v2_runner_is_refused_where_vllm_cannot_run_it(
    served: Any, variable: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU build lacks Triton's backend for CPUs. No other runner takes its place."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", variable)
    layout = replace(served.layout, runner="v2")
    with pytest.raises(ConfigurationError, match=told):
        config_of(replace(served, layout=layout), replace(OPTIONS, runner="v2"))


def test_other_sites_are_another_compiled_model(served: Any) -> None:
    """vLLM's key of compiled models leaves the worker's class out, and has the layout in it.

    So vLLM never takes a model that was compiled without edits, by whomever, for a steered one.
    """
    unsteered = config_of(served)
    unsteered.additional_config = {}
    keys = {
        config_of(replace(served, layout=layout)).compute_hash()
        for layout in (served.layout, Layout(served.layout.slots, ()), Layout(3, ()))
    }
    assert len(keys) == 3
    assert config_of(served).compute_hash() in keys
    assert unsteered.compute_hash() not in keys
