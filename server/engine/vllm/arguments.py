"""Turns the operator's options into vLLM's configuration, and refuses what cannot be steered."""

import json
import re
import secrets
import shlex
from argparse import ArgumentError, Namespace
from collections.abc import Collection, Sequence
from typing import Any, Final

import psutil
from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server.config import ConfigurationError
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.limits import refuse_unsupported
from server.engine.vllm.served_model import ServedModel

_WORKERS: Final = {
    ("cpu", "v1"): "server.engine.vllm.plugin.cpu_worker.SteeredCPUWorker",
    ("cpu", "v2"): "server.engine.vllm.plugin.v2.cpu_worker.SteeredV2CPUWorker",
    ("cuda", "v1"): "server.engine.vllm.plugin.gpu_worker.SteeredGPUWorker",
    ("cuda", "v2"): "server.engine.vllm.plugin.v2.gpu_worker.SteeredV2GPUWorker",
}
# vLLM's options that an operator may set. Others could change the model, its scheduler or its
# sampler in ways with which steering was not shown; `limits` refuses more, by their values.
_ALLOWED: Final = frozenset(
    {
        *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
        *("--distributed-executor-backend", "--max-parallel-loading-workers"),
        *("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--device-ids"),
        *("--distributed-timeout-seconds", "--cpu-distributed-timeout-seconds"),
        *("--disable-custom-all-reduce", "--numa-bind", "--numa-bind-nodes", "--numa-bind-cpus"),
        *("--gpu-memory-utilization", "--device-memory-utilization", "--block-size"),
        *("--kv-cache-dtype", "--num-gpu-blocks-override", "--enable-flashinfer-autotune"),
        *("--quantization", "-q", "--quantization-config", "--attention-backend"),
        *("--linear-backend", "--enforce-eager", "--cudagraph-capture-sizes"),
        *("--max-cudagraph-capture-size", "--compilation-config", "-cc", "--optimization-level"),
        *("--load-format", "--download-dir", "--revision", "--hf-token", "--ignore-patterns"),
        *("--safetensors-load-strategy", "--model-loader-extra-config", "--use-tqdm-on-load"),
        *("--async-scheduling", "--no-async-scheduling", "--long-prefill-token-threshold"),
        *("--scheduler-reserve-full-isl", "--no-scheduler-reserve-full-isl", "--stream-interval"),
    }
)
_CPU_MEMORY: Final = 0.25  # share of the free memory that the KV cache takes unless one is given


def vllm_config(served: ServedModel, options: VllmOptions) -> Any:
    """Return vLLM's `VllmConfig`.

    Raises:
        ConfigurationError: vLLM refuses an option, or steering does not work with it.
    """
    own = _own_arguments(served, options)
    arguments = [text for pair in own.items() for text in pair if text]
    try:
        arguments += _given_arguments(options.vllm_args, own)
        config = AsyncEngineArgs.from_cli_args(_parsed(arguments)).create_engine_config()
        refuse_unsupported(config)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(f"vLLM cannot be started like this: {_sentence(error)}") from error
    return config


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"vLLM has no option {unknown[0]}")
    return parsed


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):  # one of vLLM's own checks
        return "; ".join(problem["msg"] for problem in error.errors())
    return str(error)


def _given_arguments(text: str, own: Collection[str]) -> list[str]:
    given = shlex.split(text)
    for argument in given:
        # `--compilation-config.mode=0` is one of vLLM's ways to write a part of an option.
        name, *_ = re.split(r"[=.]", argument, maxsplit=1)
        name = name.replace("_", "-")
        if name in own:
            raise ValueError(f"{name} is not an option for --vllm-args, as steerserve sets it")
        if re.match("--?[a-z]", name, re.IGNORECASE) and name not in _ALLOWED:
            known = ", ".join(sorted(each for each in _ALLOWED if each.startswith("--")))
            raise ValueError(
                f"steering was not shown to work with {name}; --vllm-args takes {known}"
            )
    return given


def _own_arguments(served: ServedModel, options: VllmOptions) -> dict[str, str]:
    """Return the options that steerserve sets: name -> value, empty for a switch."""
    arguments = {
        "--model": served.source,
        "--dtype": served.dtype,
        "--skip-tokenizer-init": "",  # prompts arrive as token ids, and text is made here
        # vLLM wants room for one token more than a prompt has, also to score it. That token is
        # sampled and never computed, so one more is not beyond the model's positions.
        "--max-model-len": str(served.max_model_len + 1),
        "--max-num-seqs": str(options.max_batch_size),
        "--max-num-batched-tokens": str(options.max_batch_tokens),
        "--max-logprobs": "-1",
        "--scheduling-policy": "priority",
        # Requests without a seed draw by this one. vLLM's default is 0, so that each start would
        # repeat the draws of the one before.
        "--seed": str(secrets.randbelow(2**31)),
        "--worker-cls": _WORKERS[served.device, options.runner],
        "--additional-config": json.dumps(served.layout.to_config()),
        "--enable-prefix-caching" if options.prefix_cache else "--no-enable-prefix-caching": "",
    }
    size = None if options.kv_cache_gb is None else int(options.kv_cache_gb * 1e9)
    if size is None and served.device == "cpu":
        size = int(psutil.virtual_memory().available * _CPU_MEMORY)
    if size is not None:
        arguments["--kv-cache-memory-bytes"] = str(size)
    return arguments
