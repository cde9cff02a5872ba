"""What only a GPU can show: its kernels, its graphs, and that no step waits for it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from server.engine.base import Edit, Request, SamplingSettings, StepOutput
from server.engine.torch import kv_plan, readout
from server.engine.torch.build import EngineOptions, build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda_graphs import GraphRunner
from server.engine.torch.loader import LoadedModel, load_model
from server.engine.torch.paged_attention import PagedMemory
from server.engine.torch.postprocess import Delivery
from server.engine.torch.sequence import Sequence
from server.engine.torch.slab import SlabShape
from server.engine.torch.slab_attention import SlabMemory
from server.engine.torch.soft_cap import FlexSoftCapped, choose_soft_capped
from server.engine.torch.transfer import fetch
from server.engine.torch.varlen import GatheredForm, PagedForm, available_forms
from server.engine.torch.varlen_check import check_form
from steering.settings import AffineSettings
from tests.oracles import Oracle
from tests.steered import (
    NEW_TOKENS,
    PROMPTS,
    STACKS,
    interventions_of,
    logprobs_of,
    stack_of,
    tokens_of,
)
from tests.stepped import finish, sequence

T = TypeVar("T")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Which torch says where it is told to refuse waits, and errors are made of warnings here.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

OPTIONS = EngineOptions(
    kv_cache_gb=0.05, max_batch_tokens=64, max_batch_size=20, check_invariants=True
)
# Of log-probabilities, the largest difference and the mean; several times what rounding weights
# and activations gave on a CPU.
TOLERANCES = {"float16": (0.02, 0.005), "bfloat16": (0.3, 0.04)}


class LoadOnGpu(Protocol):
    def __call__(self, family: str = "llama", dtype: str = "bfloat16") -> LoadedModel: ...


@pytest.fixture
def load_on_gpu(tiny_folders: Mapping[str, Path]) -> LoadOnGpu:
    def load(family: str = "llama", dtype: str = "bfloat16") -> LoadedModel:
        return load_model(str(tiny_folders[family]), dtype, "cuda")

    return load


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_paged_form(core: EngineCore) -> bool:
    """Whether the installed torch reads pages where they are, and rightly."""
    memory = core.store.memory
    assert isinstance(memory, PagedMemory)
    return isinstance(memory.form, PagedForm)


def need_graphs(core: EngineCore) -> GraphRunner:
    """The runner with graphs; skips where this torch has none of them."""
    if not on_paged_form(core):
        pytest.skip(f"torch {torch.__version__} does not read pages, so nothing is replayed")
    assert isinstance(core._runner, GraphRunner)
    assert_captured(core._runner)
    assert core._runner.graphs > 0
    return core._runner


def assert_captured(runner: GraphRunner) -> None:
    """No graph was given up."""
    assert None not in runner._graphs.values()


def assert_near_oracle(
    oracle: Oracle, prompt: bytes, name: str, outputs: list[StepOutput], family: str, dtype: str
) -> None:
    """The oracle, given the tokens that were drawn, gives them the same log-probabilities."""
    tokens, found = tokens_of(outputs), torch.tensor(logprobs_of(outputs))
    stack = stack_of(family, STACKS[name])
    logits = oracle.logits([*prompt, *tokens], len(prompt), stack, last=len(tokens) + 1)
    expected = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    difference = (found - expected).abs()
    largest, mean = TOLERANCES[dtype]
    assert float(difference.max()) < largest, name
    assert float(difference.mean()) < mean, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_any_mix_in_one_batch_equals_the_oracle(
    load_on_gpu: LoadOnGpu, tiny_folders: Mapping[str, Path], family: str, dtype: str
) -> None:
    core = build_core(load_on_gpu(family, dtype), OPTIONS)
    kind = SlabMemory if family == "gemma2" else PagedMemory  # FlashAttention has no soft caps
    assert isinstance(core.store.memory, kind)
    names = list(STACKS)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(names))]
    sequences = [
        sequence(prompt, STACKS[name]) for prompt, name in zip(prompts, names, strict=True)
    ]
    mixed = finish(core, sequences, family)
    # In float32 on the CPU, with weights that were rounded as the engine's.
    rounded = load_model(str(tiny_folders[family]), dtype).model
    oracle = Oracle(rounded.float())  # type: ignore[no-untyped-call]
    for prompt, name, outputs in zip(prompts, names, mixed, strict=True):
        assert_near_oracle(oracle, prompt, name, outputs, family, dtype)


def test_a_request_gets_in_a_mix_what_it_gets_alone(load_on_gpu: LoadOnGpu) -> None:
    core = build_core(load_on_gpu(dtype="float16"), OPTIONS)
    names = ("base", "a", "b then a", "r", "a and r", "four")
    mixed = finish(core, [sequence(PROMPTS[0], STACKS[name]) for name in names])
    for name, outputs in zip(names, mixed, strict=True):
        [alone] = finish(core, [sequence(PROMPTS[0], STACKS[name])])
        # Up to a near tie, where rounding may decide.
        for one, other in zip(alone, outputs, strict=True):
            if one.token_ids != other.token_ids:
                top = [each.logprob for each in one.logprobs[0].top[:2]]
                assert top[0] - top[1] < 0.02, name
                break
            assert one.logprobs[0].chosen.logprob == pytest.approx(
                other.logprobs[0].chosen.logprob, abs=0.02
            )


def test_replayed_steps_give_what_others_give(load_on_gpu: LoadOnGpu) -> None:
    """In a full bucket, so that shapes are equal."""
    names = ("base", "a", "b then a", "r", "a and r", "a support", "four", "wide")

    def logprobs(options: EngineOptions) -> list[list[float]]:
        core = build_core(load_on_gpu(), options)
        runner = need_graphs(core) if options.cuda_graphs else None
        sequences = [sequence(PROMPTS[0], STACKS[name]) for name in names]
        outputs = finish(core, sequences)
        if runner is not None:
            assert_captured(runner)
        return [logprobs_of(each) for each in outputs]

    replayed = logprobs(replace(OPTIONS, dose_interval=0))
    others = logprobs(replace(OPTIONS, dose_interval=0, cuda_graphs=False))
    for name, one, other in zip(names, replayed, others, strict=True):
        assert one == pytest.approx(other, abs=1e-3), name


def test_edits_in_graphs_follow_settings_without_another_capture(load_on_gpu: LoadOnGpu) -> None:
    core = build_core(load_on_gpu(), replace(OPTIONS, dose_interval=0, max_loaded_interventions=2))
    runner = need_graphs(core)
    finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    made, seen = runner.graphs, set()
    for digest, strength in (("a", 1.0), ("a", 0.4), ("b", 0.8), ("a", -0.5), ("b", 0.3)):
        edits = (Edit(digest, AffineSettings(strength)),)
        [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
        seen.add(tuple(logprobs_of(outputs)))
    assert len(seen) == 5
    assert runner.graphs == made
    assert_captured(runner)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_waits_for_the_device_when_it_is_read_only(
    load_on_gpu: LoadOnGpu, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Prompts and decoding, steered in all ways; once all is captured."""
    options = replace(OPTIONS, cuda_graphs=graphs, dose_interval=2)
    core = build_core(load_on_gpu(), options)
    runner = need_graphs(core) if graphs else None

    def load() -> None:
        names = ("base", "a", "a and r", "four")
        asked = [
            Request("test", tuple(PROMPTS[0]), settings, STACKS["a"], with_divergence=divergence)
            for settings, divergence in (
                (SamplingSettings(NEW_TOKENS, logprobs=2, prompt_logprobs=1), False),
                (SamplingSettings(NEW_TOKENS, temperature=0.7, top_k=40), False),
                (SamplingSettings(NEW_TOKENS, min_p=0.1, presence_penalty=0.5), False),
                (SamplingSettings(NEW_TOKENS, repetition_penalty=1.2, temperature=0), True),
            )
        ]
        sequences = [sequence(PROMPTS[0], STACKS[name]) for name in names]
        finish(core, [*sequences, *map(Sequence.of, asked)])

    for _ in range(3):  # with the prefix cache, no schedule is as the one before
        load()
    made = runner.graphs if runner is not None else 0
    step = core.step
    waits: list[int] = []

    def allowed(tree: T) -> T:
        torch.cuda.set_sync_debug_mode("default")
        try:
            waits[-1] += 1
            return fetch(tree)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def watched() -> list[Delivery]:
        waits.append(0)
        try:
            torch.cuda.set_sync_debug_mode("error")
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(readout, "fetch", allowed)
    monkeypatch.setattr(core, "step", watched)
    load()
    assert len(waits) > 15
    assert max(waits) == 1
    if runner is not None:
        assert runner.graphs == made
        assert_captured(runner)


def test_both_forms_of_attention_give_the_same(
    load_on_gpu: LoadOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs() -> list[list[StepOutput]]:
        core = build_core(load_on_gpu("mistral", "float16"), replace(OPTIONS, cuda_graphs=False))
        memory = core.store.memory
        assert isinstance(memory, PagedMemory)
        seen.append(type(memory.form))
        return finish(core, [sequence(prompt, STACKS["a"]) for prompt in PROMPTS], "mistral")

    seen: list[type] = []
    best = outputs()
    gathered = available_forms(varlen_attn)[-1:]
    monkeypatch.setattr(kv_plan, "available_forms", lambda _function: gathered)
    others = outputs()
    assert seen[1] is GatheredForm
    for one, other in zip(best, others, strict=True):
        assert logprobs_of(one)[:4] == pytest.approx(logprobs_of(other)[:4], abs=0.02)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (8, 8, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_installed_kernels_are_right_at_sizes_that_models_have(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    shape = SlabShape(kv_heads, head_dim, dtype, (torch.device("cuda:0"),))
    for form in available_forms(varlen_attn):
        check_form(form, shape, heads, window)


def test_what_is_loaded_later_is_in_no_graph_of_before(load_on_gpu: LoadOnGpu) -> None:
    core = build_core(load_on_gpu(), replace(OPTIONS, dose_interval=0, prefix_cache=False))
    runner = need_graphs(core)
    [first] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    core.interventions.install("attention", interventions_of()["attention"])
    core.interventions.unpin("attention")
    [edited] = finish(core, [sequence(PROMPTS[0], STACKS["a tuple's first place"])])
    [again] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    assert logprobs_of(again) == pytest.approx(logprobs_of(first), abs=1e-3)
    assert logprobs_of(edited) != logprobs_of(first)
    assert_captured(runner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "fold"), [(256, 2), (128, 2)])  # of Gemma-2 2B and 9B, 27B
def test_soft_capped_models_attend_by_a_kernel(
    dtype: torch.dtype, head_dim: int, fold: int
) -> None:
    flex = FlexSoftCapped()
    chosen = choose_soft_capped(flex, torch.device("cuda", 0), dtype, head_dim, fold)
    assert chosen is flex
