"""vLLM's V2 model runner, steered, on a CPU without Triton's backend for CPUs.

Its kernels run in Triton's interpreter. What vLLM needs for it must be set before vLLM is imported,
and would change what other tests show, so that each use has a process of its own.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

from steering.settings import AffineSettings, RewardSettings
from tests.server.engine.vllm.plugin.test_steered_vllm import PROMPTS, STACKS, Served
from tests.vllm_models import steered_vllm, steering_args, vllm_in_this_process

HELLO, X, FOX = PROMPTS
Edits: TypeAlias = Sequence[tuple[str, AffineSettings | RewardSettings]]  # digests and settings
BLOCKS: Final = 10  # of 32 tokens: the longest requests need five
_BYTES_OF_A_TOKEN: Final = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, their size, float32
_TOO_STRONG: Final = 1e30  # a strength with which activations overflow
VOCABULARY: Final = 150_000

MIX: Final = (
    (FOX, "base"),
    (FOX, "a on what is generated"),
    (X, "three"),
    (FOX, "three"),
    (HELLO, "a on the prompt"),
    (FOX, "r"),
    (HELLO, "both parts"),
)
SEEDED: Final = (FOX, "a")
AFTER_OVERFLOW: Final = ((FOX, "base"),)


@dataclass(frozen=True)
class Seen:
    """What happened in vLLM's process."""

    mix: list[Any]  # vLLM's outputs
    preempted: set[str]
    seeded: dict[str, tuple[int, ...]]  # the draws of a seeded request, by what ran beside it
    overflow: dict[str, int]  # request -> logits that were not numbers
    after_overflow: list[Any]
    warm_up: str  # what became of vLLM's own requests when they were not expected
    foreign: str  # what became of a request that does not say how it is steered
    logprob_errors: list[float]  # of vLLM's log-probabilities, for rows of a wide vocabulary


def seen_in_a_process_of_its_own(folder: Path) -> Seen:
    """Run vLLM, and return what happened."""
    # Triton reads this when it is imported, which may be before any function of ours is called.
    process = ProcessPoolExecutor(1, get_context("spawn"))
    with patch.dict(os.environ, TRITON_INTERPRET="1"), process:
        return process.submit(_run, folder).result()


def _run(folder: Path) -> Seen:
    _pretend_that_triton_has_a_backend_for_cpus()
    with vllm_in_this_process(folder / "cache", "v2"):
        _replace_what_the_interpreter_lacks()
        return _seen(folder / "model")


def _seen(folder: Path) -> Seen:
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": BLOCKS * 32 * _BYTES_OF_A_TOKEN,
        "block_size": 32,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    with steered_vllm("llama", folder, runner="v2", **options) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        warm_up = _failure(lambda: _warm_up(worker, expected=False))
        _warm_up(worker)
        served = Served(llm, "llama")
        with _recorded_preemptions() as preempted:
            mix = served.generate(MIX, logprobs=0, prompt_logprobs=0)
        seeded = {
            beside: _seeded(served, others, seed)
            for beside, others, seed in (
                ("nothing", [], 7),
                ("others", MIX[2:5], 7),
                ("another seed", [], 8),
            )
        }
        overflow = _overflow(served)
        after = served.generate(AFTER_OVERFLOW, logprobs=0, prompt_logprobs=0)
        return Seen(
            mix=mix,
            preempted=preempted,
            seeded=seeded,
            overflow=overflow,
            after_overflow=after,
            logprob_errors=_logprob_errors(),
            warm_up=warm_up,
            foreign=_failure(lambda: _foreign(llm)),
        )


def _pretend_that_triton_has_a_backend_for_cpus() -> None:
    from triton.backends import Backend, backends  # noqa: PLC0415

    driver = type("Inactive", (), {"is_active": staticmethod(lambda: False)})
    backends["cpu"] = Backend(compiler=None, driver=driver)


def _replace_what_the_interpreter_lacks() -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch  # noqa: PLC0415
    from vllm.v1.worker.gpu.metrics import logits  # noqa: PLC0415
    from vllm.v1.worker.gpu.sample import sampler  # noqa: PLC0415

    logits.libdevice = SimpleNamespace(isnan=lambda block: block != block)
    sampler.apply_top_k_top_p = apply_top_k_top_p_pytorch


@contextmanager
def _recorded_preemptions() -> Iterator[set[str]]:
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    preempt, preempted = Scheduler._preempt_request, set()

    def recording(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.add(request.request_id)
        preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = recording
    try:
        yield preempted
    finally:
        Scheduler._preempt_request = preempt


def _seeded(served: Served, others: Sequence[tuple[bytes, str]], seed: int) -> tuple[int, ...]:
    """Return the draws of a request with a seed, which the V2 runner is told by vLLM itself."""
    parameters = [
        _parameters(STACKS[edits], served, temperature=1.0, seed=seed if place == 0 else None)
        for place, (_, edits) in enumerate([SEEDED, *others])
    ]
    # Without K/V in common: the cache is off.
    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in [SEEDED, *others]]
    [output, *_] = served.llm.generate(prompts, parameters, use_tqdm=False)
    return tuple(output.outputs[0].token_ids)


def _parameters(edits: Edits, served: Served, **options: Any) -> Any:
    from vllm import SamplingParams  # noqa: PLC0415

    return SamplingParams(
        detokenize=False,
        ignore_eos=True,
        extra_args=steering_args(edits, served.slots),
        **{"max_tokens": 4, "temperature": 0, **options},
    )


def _overflow(served: Served) -> dict[str, int]:
    """Fill blocks with keys and values that are not numbers; return what vLLM counted."""
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    update, counted = Scheduler.update_from_output, dict[str, int]()

    def recording(self: Any, scheduled: Any, output: Any) -> Any:
        counted.update(output.num_nans_in_logits or {})
        return update(self, scheduled, output)

    Scheduler.update_from_output = recording
    try:
        stacks: tuple[Edits, ...] = ([("a", AffineSettings(_TOO_STRONG))], ())
        prompts = [{"prompt_token_ids": list(FOX)} for _ in stacks]
        parameters = [_parameters(edits, served) for edits in stacks]
        served.llm.generate(prompts, parameters, use_tqdm=False)
    finally:
        Scheduler.update_from_output = update
    return counted


def _warm_up(worker: Any, *, expected: bool = True) -> None:
    """Send the requests that vLLM's worker for GPUs sends before it serves."""
    from vllm.model_executor.warmup.attention_warmup import (  # noqa: PLC0415
        mixed_batch_attention_warmup,
    )
    from vllm.v1.worker.gpu.warmup import warmup_kernels  # noqa: PLC0415

    runner = worker.model_runner
    with runner.warming_up() if expected else nullcontext():
        mixed_batch_attention_warmup(worker)
        # The interpreter cannot run the kernel for grammars.
        warmup_kernels(runner, worker.execute_model, lambda _grammar: worker.sample_tokens(None))


def _foreign(llm: Any) -> None:
    from vllm import SamplingParams  # noqa: PLC0415

    prompt = {"prompt_token_ids": [1, 2]}
    llm.generate([prompt], SamplingParams(detokenize=False), use_tqdm=False)


def _failure(call: Callable[[], None]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "nothing"


def _wide_logits() -> Tensor:
    """Make logits of a wide vocabulary, as peaked as a language model's: (rows, vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.5, 2.0, 5.0]).unsqueeze(-1)
    return torch.randn(len(spread), VOCABULARY, generator=generator) * spread


def _logprob_errors() -> list[float]:
    """Return by how much vLLM's log-probabilities are off, on average over tokens of each row."""
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs  # noqa: PLC0415

    logits = _wide_logits()
    tokens = torch.arange(0, VOCABULARY, 1500).repeat(len(logits), 1)
    exact = logits.double().log_softmax(-1).gather(-1, tokens)
    found: list[float] = (compute_token_logprobs(logits, tokens) - exact).mean(-1).tolist()
    return found
