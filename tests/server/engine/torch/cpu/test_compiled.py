"""Tests compiled layers against the oracle, and engines where compiling fails."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from server.engine.request import Edit
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cpu import compiled
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from server.engine.torch.step import decoder
from steering.settings import AffineSettings
from tests.conftest import LoadTiny, StartEngine
from tests.steered import (
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    generate,
    interventions_of,
    logprobs_of,
    oracle_of,
)
from tests.stepped import finish, sequence
from tests.tiny import random_maps

pytestmark = pytest.mark.timeout(900)  # compiling takes minutes on a busy machine
OPTIONS = EngineOptions(
    # 13 slots, as many as the recorded prefill has tokens: the compiler must not take the two
    # sizes for one.
    kv_cache_gb=0.02,
    compile_layers=True,
    compile_at_once=True,
    prefix_cache=False,
    max_loaded_interventions=12,
    dose_interval=1,
)
SECONDS = 600.0
FAMILY = "mistral"  # with windows that are shorter than the prompts
# With compile_at_once, graphs for a stack are made as soon as a request uses it.
FEW: Mapping[str, tuple[Edit, ...]] = {
    name: STACKS[name]
    for name in ("base", "a", "a at another strength", "b", "a on the prompt", "r", "a and r")
}


def compiled_of(core: EngineCore) -> compiled.CompiledLayers:
    layers = core._runner.compiled
    assert isinstance(layers, compiled.CompiledLayers)
    return layers


def everything_made(layers: compiled.CompiledLayers) -> bool:
    """Return whether the graphs of all expected and all used variants of layers are ready."""
    graphs = layers._graphs
    return all(graphs.has_graphs(variant) for variant in {*graphs._permanent, *graphs._used})


def run_compiled_only(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that all graphs are ready, and fail the test if a layer runs uncompiled from now on."""
    layers = compiled_of(core)
    assert everything_made(layers), "some graphs could not be made"
    monkeypatch.setattr(layers._layers, "_originals", [pytest.fail] * 2)


def wait_for_graphs(core: EngineCore) -> None:
    assert compiled_of(core).wait(SECONDS), "it takes too long"


async def everything_compiled(engine: TorchEngine) -> None:
    await asyncio.to_thread(wait_for_graphs, engine._core)


@pytest.fixture(scope="module")
def core(load_tiny: LoadTiny) -> EngineCore:
    """Build a core and wait for the graphs of its default sites; tests have it make others."""
    oracle_of(FAMILY)  # made first, because the compiler draws from the same random generator
    core = build_core(load_tiny(FAMILY), OPTIONS)
    assert core.compiling
    wait_for_graphs(core)
    assert core.compiling == 0
    return core


def test_the_default_sites_are_compiled_before_anybody_asks(core: EngineCore) -> None:
    layers = compiled_of(core)
    assert {variant.depth for variant in layers._graphs._permanent} == {0, 1}
    assert everything_made(layers)


CASES = [(prompt, edits) for edits in FEW.values() for prompt in PROMPTS]


def test_any_mix_on_compiled_layers_equals_the_oracle(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for edits in FEW.values():
        finish(core, [sequence(PROMPTS[1], edits)], FAMILY)
    wait_for_graphs(core)
    run_compiled_only(core, monkeypatch)
    mixed = finish(core, [sequence(*case) for case in CASES], FAMILY)
    for outputs, (prompt, edits) in zip(mixed, CASES, strict=True):
        assert_equal_to_oracle(outputs, FAMILY, prompt, edits)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
async def test_layers_that_are_not_alike_have_graphs_of_their_own(
    start_engine: StartEngine, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPT-2 scales attention by the layer's number; one layer of the Qwen2 has a window."""
    engine = await start_engine(interventions_of(family), family, OPTIONS)
    for edits in FEW.values():  # runs uncompiled until the stack's graphs are made
        await generate(engine, PROMPTS[1], edits)
    await everything_compiled(engine)
    run_compiled_only(engine._core, monkeypatch)
    mixed = await asyncio.gather(*(generate(engine, *case) for case in CASES))
    for outputs, (prompt, edits) in zip(mixed, CASES, strict=True):
        assert_equal_to_oracle(outputs, family, prompt, edits)


def test_gates_and_inputs_are_compiled_too(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = (*STACKS["gated and supported"], *STACKS["inputs"])
    finish(core, [sequence(PROMPTS[1], edits)], FAMILY)
    wait_for_graphs(core)
    run_compiled_only(core, monkeypatch)
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)], FAMILY)
    assert_equal_to_oracle(outputs, FAMILY, PROMPTS[0], edits)


def logprobs_beside(core: EngineCore, *stacks: tuple[Edit, ...]) -> list[list[float]]:
    """Return the log-probabilities of equal prompts, one for each stack, computed in one batch."""
    outputs = finish(core, [sequence(PROMPTS[0], each, tokens=6) for each in stacks], FAMILY)
    return [logprobs_of(each) for each in outputs]


def test_unsteered_rows_keep_their_bits_beside_steered_ones(core: EngineCore) -> None:
    """A step with edits runs another graph than one without, yet an unsteered row stays equal."""
    nothing = (Edit("a", AffineSettings(0.0)),)
    alone = logprobs_beside(core, (), (), ())
    assert alone == logprobs_beside(core, nothing, (), nothing)
    logprobs_beside(core, STACKS["a support"])
    wait_for_graphs(core)
    for steered in ("a", "a support", "r"):
        assert alone[0] == logprobs_beside(core, (), STACKS[steered], ())[0] != []
        assert alone[2] == logprobs_beside(core, STACKS[steered], STACKS["a"], ())[2]


def test_compiled_layers_tell_the_same_doses(core: EngineCore, load_tiny: LoadTiny) -> None:
    doses = []
    for each in (build_core(load_tiny(FAMILY), replace(OPTIONS, compile_layers=False)), core):
        found = []
        for name in ("a", "a and r", "a on the prompt"):
            [outputs] = finish(each, [sequence(PROMPTS[0], STACKS[name])], FAMILY)
            found += [dose for output in outputs for dose in output.doses if dose is not None]
        doses.append(found)
    assert len(doses[0]) > 20
    assert doses[1] == pytest.approx(doses[0], rel=1e-3)


def take_all_slots(core: EngineCore) -> None:
    """Load other interventions, so that the next one gets a slot that held one of these."""
    for number in range(OPTIONS.max_loaded_interventions):
        digest = f"other {number}"
        core.interventions.pin_or_install(digest, {digest: random_maps(20 + number)})
        core.interventions.slots.unpin(digest)


def test_a_slot_that_is_filled_anew_steers_as_what_it_holds_now(core: EngineCore) -> None:
    """The interventions differ in their sites too: `b` lacks a site of `a`."""
    for _ in range(2):
        for name in ("a", "b", "a support", "a"):
            take_all_slots(core)
            [edit] = STACKS[name]
            assert core.interventions.missing({edit.digest})
            [outputs] = finish(core, [sequence(PROMPTS[0], STACKS[name])], FAMILY)
            assert_equal_to_oracle(outputs, FAMILY, PROMPTS[0], STACKS[name])
        wait_for_graphs(core)


def broken_compiler(*_: object, **__: object) -> object:
    raise RuntimeError("there is no C++ compiler here\nand more that nobody wants to read")


async def test_without_a_compiler_layers_run_as_they_are_and_one_sentence_says_so(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken_compiler)
    with caplog.at_level(logging.WARNING):
        engine = await start_engine(interventions_of(), "llama", OPTIONS)
        await everything_compiled(engine)
        outputs = await generate(engine, PROMPTS[0], STACKS["a"])
    said = {record.message for record in caplog.records}
    assert said == {
        "layers run uncompiled, which is slower, as with --no-compile-layers: RuntimeError: "
        "there is no C++ compiler here"
    }
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], STACKS["a"])


async def test_a_graph_that_is_wrong_for_a_layer_is_not_used(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny GPT-2 scales each layer's attention by a constant, so one graph cannot serve two."""
    monkeypatch.setattr(decoder, "_signature", lambda _layer: "all alike")
    with caplog.at_level(logging.WARNING):
        engine = await start_engine(interventions_of("gpt2"), "gpt2", OPTIONS)
        await everything_compiled(engine)
    assert "what was compiled is off by" in caplog.text
    outputs = await generate(engine, PROMPTS[0], STACKS["a"])
    assert_equal_to_oracle(outputs, "gpt2", PROMPTS[0], STACKS["a"])
