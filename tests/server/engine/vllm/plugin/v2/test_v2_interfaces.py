"""What the plugin relies on in vLLM's V2 runner: `make test-vllm`.

Nobody can run it on a GPU in these tests, so a version of vLLM that changes one of these must be
read before it is served.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
WORKER = "vllm.v1.worker"
RUNNER = f"{WORKER}.gpu.model_runner:GPUModelRunner"
PROMPTS = f"{WORKER}.gpu.sample.prompt_logprob"
REQUESTS = f"{WORKER}.gpu.states:RequestState"

# Overridden by the plugin, or called by it, or called by vLLM with what the plugin gives.
PARAMETERS = {
    f"{RUNNER}.__init__": "vllm_config device",
    f"{RUNNER}.load_model": "load_dummy_weights args model kwargs",
    f"{RUNNER}.get_model": "",
    f"{RUNNER}.finish_requests": "scheduler_output",
    f"{RUNNER}.add_requests": "scheduler_output",
    f"{RUNNER}.update_requests": "scheduler_output",
    f"{RUNNER}.prepare_inputs": "scheduler_output batch_req_state batch_desc num_active_loras",
    f"{RUNNER}._dummy_run": (
        "num_tokens args skip_attn uniform_decode context_len skip_eplb is_profile "
        "valid_dummy_state_slots randomize_inputs kwargs"
    ),
    f"{RUNNER}._dummy_sampler_run": "hidden_states",
    f"{RUNNER}.capture_model": "profile_only",
    f"{RUNNER}._init_kv_zero_meta": "",
    f"{RUNNER}.sample": "hidden_states input_batch grammar_output",
    f"{RUNNER}.sample_tokens": "grammar_output",
    f"{PROMPTS}:PromptLogprobsWorker.__init__": "max_num_reqs device logprobs_mode",
    f"{PROMPTS}:PromptLogprobsWorker.compute_prompt_logprobs": (
        "logits_fn hidden_states input_batch all_token_ids num_computed_tokens prompt_lens"
    ),
    f"{PROMPTS}:compute_prompt_logprobs_with_chunking": (
        "prompt_token_ids prompt_hidden_states logits_fn num_prompt_logprobs logprobs_mode"
    ),
    f"{WORKER}.utils:KVBlockZeroer.zero_block_ids": "block_ids",
    f"{WORKER}.gpu_worker:Worker._make_model_runner": "",
    f"{WORKER}.gpu_worker:Worker.initialize_from_config": "kv_cache_config",
    f"{WORKER}.gpu_worker:Worker.compile_or_warm_up_model": "",
    f"{WORKER}.gpu_worker:Worker.init_device": "",
}

# Statements of vLLM on which the plugin relies, in the function that has each.
STATEMENTS = [
    # A preempted request is removed, and comes back as a new one.
    (f"{RUNNER}.finish_requests", "finished_req_ids = finished_req_ids.union(preempted_req_ids)"),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "scheduled_new_reqs.extend(scheduled_resumed_reqs)",
    ),
    # Requests end before others begin, and inputs are made after both, in real steps only.
    (
        f"{RUNNER}.execute_model",
        "self.finish_requests(scheduler_output) self.free_states(scheduler_output) "
        "self.add_requests(scheduler_output) self.update_requests(scheduler_output)",
    ),
    (
        f"{RUNNER}.execute_model",
        "assert batch_req_state is not None input_batch = self.prepare_inputs(",
    ),
    # Blocks are zeroed by the plugin before vLLM copies others into some of them.
    (f"{RUNNER}.update_requests", "copy_kv_cache_blocks_inplace("),
    # A step has one row for each request, in the order of the batch.
    (f"{RUNNER}.prepare_inputs", "total_num_logits = num_reqs"),
    (
        f"{RUNNER}.sample",
        "sample_hidden_states = hidden_states[input_batch.logits_indices] "
        "logits = self.model.compute_logits(sample_hidden_states)",
    ),
    # The host knows how many tokens are computed.
    (
        f"{RUNNER}.prepare_inputs",
        "num_computed_tokens_np = self.req_states.num_computed_tokens_np[idx_mapping_np]",
    ),
    (f"{RUNNER}.update_requests", "num_computed_tokens_np[req_index] = num_computed_tokens"),
    (f"{REQUESTS}.add_request", "self.num_computed_tokens_np[req_idx] = num_computed_tokens"),
    # The prompt of a request that was preempted is as long as before; its prefill is longer.
    (
        f"{REQUESTS}.add_request",
        "self.prompt_len.np[req_idx] = prompt_len prefill_len = len(all_token_ids)",
    ),
    # All tokens of the step are scored if one request wants it.
    (
        f"{PROMPTS}:PromptLogprobsWorker.compute_prompt_logprobs",
        "hidden_states[: input_batch.num_tokens], logits_fn,",
    ),
    # The draws depend on a request's seed, the token's position, and the token.
    (f"{WORKER}.gpu.sample.sampler:Sampler._sample_random", "self.sampling_states.seeds.gpu, pos,"),
    (
        f"{WORKER}.gpu.sample.sampler:Sampler.__call__",
        "pos = input_batch.positions[input_batch.logits_indices]",
    ),
    # Rows without numbers are counted before anything changes them.
    (
        f"{WORKER}.gpu.sample.sampler:Sampler.__call__",
        "num_nans = get_num_nans(logits) if self.compute_nans else None",
    ),
]


def found(path: str) -> Any:
    module, _, name = path.partition(":")
    return attrgetter(name)(import_module(module))


@pytest.mark.parametrize("path", PARAMETERS)
def test_the_parameters_are_those_that_the_plugin_knows(path: str) -> None:
    names = [name for name in inspect.signature(found(path)).parameters if name != "self"]
    assert names == PARAMETERS[path].split()


@pytest.mark.parametrize(("path", "statement"), STATEMENTS)
def test_vllm_does_what_the_plugin_relies_on(path: str, statement: str) -> None:
    function: Callable[..., object] = inspect.unwrap(found(path))
    lines = (line.partition("  #")[0].strip() for line in inspect.getsource(function).splitlines())
    source = " ".join(line for line in lines if line and not line.startswith("#"))
    assert statement in source


def test_a_batch_tells_the_host_what_the_route_needs() -> None:
    """The batch that vLLM makes for dummy runs, which has the fields of every batch."""
    batch_class = found(f"{WORKER}.gpu.input_batch:InputBatch")
    buffers = found(f"{WORKER}.gpu.input_batch:InputBuffers")(4, 16, torch.device("cpu"))
    batch = batch_class.make_dummy(3, 7, buffers)
    assert {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np", "idx_mapping_np"} <= {
        field.name for field in fields(batch)
    }
    assert len(batch.req_ids) == 3
    for array in (batch.num_scheduled_tokens, batch.num_computed_tokens_np, batch.idx_mapping_np):
        assert isinstance(array, np.ndarray)
        assert array.shape == (3,)
    assert batch.num_scheduled_tokens.sum() == batch.num_tokens == 7


def test_the_plugin_overrides_methods_that_vllm_has() -> None:
    from server.engine.vllm.plugin.v2 import prompt_logprobs, runner  # noqa: PLC0415  where vLLM is

    own = {"warming_up", "_parts", "_warms_up"}
    for steered in (runner.SteeredV2Runner, prompt_logprobs.SteeredPromptLogprobs):
        [vllm_class] = steered.__bases__
        names = {name for name, each in vars(steered).items() if inspect.isfunction(each)}
        assert {name for name in names - own if not hasattr(vllm_class, name)} == set()
