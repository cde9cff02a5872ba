"""Tests engines on a GPU against the oracle, in mixed batches, with pages and with slabs.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from server.engine.output import StepOutput
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.build import build_core
from server.engine.torch.model.loader import load_model
from server.engine.torch.options import EngineOptions
from tests.cuda.devices import MARKS, OPTIONS, LoadOnDevice, Replays, graphs_of, make_all
from tests.oracles import Oracle
from tests.steered import (
    NEW_TOKENS,
    PROMPTS,
    STACKS,
    logprobs_of,
    stack_of,
    tokens_of,
)
from tests.stepped import finish, sequence

pytestmark = MARKS

# The largest and the median difference that is allowed between log-probabilities: several times
# what rounding of weights and activations caused on a CPU. The largest applies only to edits
# without jumps.
TOLERANCES = {"float32": (0.01, 0.001), "float16": (0.02, 0.02), "bfloat16": (0.3, 0.1)}


def jumps(name: str) -> bool:
    """Return whether an edit has a discontinuity, at which rounding may change a token a lot.

    A map has one where its support ends, a reward's gradient where a hidden unit becomes active.
    """
    return any(edit.digest in ("supported", "r", "wide") for edit in STACKS[name])


def assert_small(differences: Sequence[float], name: str, dtype: str) -> None:
    """Assert that differences of log-probabilities are no larger than rounding explains."""
    largest, middle = TOLERANCES[dtype]
    assert median(differences) < middle, name
    assert jumps(name) or max(differences) < largest, name


def assert_near_oracle(
    oracle: Oracle, prompt: bytes, name: str, outputs: list[StepOutput], family: str, dtype: str
) -> None:
    """Assert that the oracle gives the engine's tokens nearly the same log-probabilities."""
    tokens, found = tokens_of(outputs), torch.tensor(logprobs_of(outputs))
    stack = stack_of(family, STACKS[name])
    logits = oracle.logits([*prompt, *tokens], len(prompt), stack, last=len(tokens) + 1)
    expected = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert_small((found - expected).abs().tolist(), name, dtype)


def assert_alike(some: list[StepOutput], others: list[StepOutput], name: str, dtype: str) -> None:
    """Assert equal tokens and log-probabilities up to a near tie, which rounding may decide."""
    differences = []
    for one, other in zip(some, others, strict=True):
        if one.token_ids != other.token_ids:
            best, second = (each.logprob for each in one.logprobs[0].top[:2])
            assert jumps(name) or best - second < TOLERANCES[dtype][0], name
            break
        logprob, its_logprob = (each.logprobs[0].chosen.logprob for each in (one, other))
        differences.append(abs(logprob - its_logprob))
    assert_small(differences, name, dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_an_engine_uses_pages_and_graphs_of_its_own_accord(
    load_on_device: LoadOnDevice, family: str
) -> None:
    core = build_core(load_on_device(family), replace(OPTIONS, attention="automatic"))
    assert isinstance(core.store.memory, PagedMemory)
    graphs_of(core)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_any_mix_in_one_batch_equals_the_oracle(
    load_on_device: LoadOnDevice,
    tiny_folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: str,
) -> None:
    """The steps run first without graphs, then as replays of graphs."""
    replays = Replays(monkeypatch)
    core = build_core(load_on_device(family, dtype), OPTIONS)
    cases = [(PROMPTS[number % len(PROMPTS)], name) for number, name in enumerate(STACKS)]
    # The oracle runs in float32 on the CPU, with weights rounded to the engine's dtype.
    rounded = load_model(str(tiny_folders[family]), dtype).model
    oracle = Oracle(rounded.float())  # type: ignore[no-untyped-call]
    for replayed in (0, NEW_TOKENS // 2):
        replays.count = 0
        mixed = finish(core, [sequence(prompt, STACKS[name]) for prompt, name in cases], family)
        for (prompt, name), outputs in zip(cases, mixed, strict=True):
            assert_near_oracle(oracle, prompt, name, outputs, family, dtype)
        assert replays.count >= replayed
        make_all(core)


def test_a_request_gets_in_a_mix_what_it_gets_alone(load_on_device: LoadOnDevice) -> None:
    core = build_core(load_on_device(dtype="float16"), OPTIONS)
    names = ("base", "a", "b then a", "r", "a and r", "four")
    for _ in range(2):  # first without graphs, then as replays of graphs
        mixed = finish(core, [sequence(PROMPTS[0], STACKS[name]) for name in names])
        for name, outputs in zip(names, mixed, strict=True):
            [alone] = finish(core, [sequence(PROMPTS[0], STACKS[name])])
            assert_alike(alone, outputs, name, "float16")
        make_all(core)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_pages_give_what_slabs_give(load_on_device: LoadOnDevice, family: str, dtype: str) -> None:
    def outputs(options: EngineOptions, kind: type) -> list[list[StepOutput]]:
        core = build_core(load_on_device(family, dtype), options)
        assert isinstance(core.store.memory, kind)
        return finish(core, [sequence(prompt, STACKS["a"]) for prompt in PROMPTS], family)

    pages = outputs(OPTIONS, PagedMemory)
    slabs = outputs(replace(OPTIONS, attention="slabs"), SlabMemory)
    for one, other in zip(pages, slabs, strict=True):
        assert_alike(one, other, "a", dtype)
