"""Compiled layers against the oracle, and what happens where they cannot be had."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from server.engine.base import Edit
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cpu import compiled
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from server.engine.torch.step import decoder
from server.engine.torch.step.decoder import DecoderLayers
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
    # As many slots as the probe has tokens: a compiler must not take one for the other.
    kv_cache_gb=0.02,
    compile_layers=True,
    compile_at_once=True,
    prefix_cache=False,
    max_loaded_interventions=12,
    dose_interval=1,
)
SECONDS = 600.0
FAMILY = "mistral"  # with windows that are shorter than the prompts
# The graphs of each are made as soon as they are asked for.
FEW: Mapping[str, tuple[Edit, ...]] = {
    name: STACKS[name]
    for name in ("base", "a", "a at another strength", "b", "a on the prompt", "r", "a and r")
}


def compiled_of(core: EngineCore) -> compiled.CompiledLayers:
    layers = core._runner.compiled
    assert isinstance(layers, compiled.CompiledLayers)
    return layers


def everything_made(layers: compiled.CompiledLayers) -> bool:
    """Whether all graphs that were asked for are there."""
    graphs = layers._graphs
    return all(graphs.has_graphs(variant) for variant in {*graphs._permanent, *graphs._used})


def run_compiled_only(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that all graphs are there, and let no layer run uncompiled from now on."""
    layers = compiled_of(core)
    assert everything_made(layers), "some graphs could not be made"
    monkeypatch.setattr(layers._layers, "_originals", [pytest.fail] * 2)


def wait_for_graphs(core: EngineCore) -> None:
    assert compiled_of(core).wait(SECONDS), "it takes too long"


async def everything_compiled(engine: TorchEngine) -> None:
    await asyncio.to_thread(wait_for_graphs, engine._core)


@pytest.fixture(scope="module")
def core(load_tiny: LoadTiny) -> EngineCore:
    """A core whose graphs of the default sites are made; tests have it make others."""
    oracle_of(FAMILY)  # made first: the compiler draws from the same random numbers
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


async def test_layers_that_are_not_alike_have_graphs_of_their_own(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This GPT-2 scales a layer's attention by the layer's number."""
    engine = await start_engine(interventions_of("gpt2"), "gpt2", OPTIONS)
    for edits in FEW.values():  # eager, until what it asks for is there
        await generate(engine, PROMPTS[1], edits)
    await everything_compiled(engine)
    run_compiled_only(engine._core, monkeypatch)
    mixed = await asyncio.gather(*(generate(engine, *case) for case in CASES))
    for outputs, (prompt, edits) in zip(mixed, CASES, strict=True):
        assert_equal_to_oracle(outputs, "gpt2", prompt, edits)


def test_a_window_in_some_layers_makes_them_unlike(load_tiny: LoadTiny) -> None:
    assert len(DecoderLayers(load_tiny("qwen2").model).structures) == 2
    assert len(DecoderLayers(load_tiny(FAMILY).model).structures) == 1


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
    """The log-probabilities of equal prompts that are admitted, and so computed, together."""
    outputs = finish(core, [sequence(PROMPTS[0], each, tokens=6) for each in stacks], FAMILY)
    return [logprobs_of(each) for each in outputs]


def test_unsteered_rows_keep_their_bits_beside_steered_ones(core: EngineCore) -> None:
    """A step that edits runs on another graph than one that does not."""
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
    """At other sites, too: `b` lacks one of those of what was in its slot before."""
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
    """This GPT-2 scales a layer's attention by the layer's number, which is no tensor."""
    monkeypatch.setattr(decoder, "_signature", lambda _layer: "all alike")
    with caplog.at_level(logging.WARNING):
        engine = await start_engine(interventions_of("gpt2"), "gpt2", OPTIONS)
        await everything_compiled(engine)
    assert "what was compiled is off by" in caplog.text
    outputs = await generate(engine, PROMPTS[0], STACKS["a"])
    assert_equal_to_oracle(outputs, "gpt2", PROMPTS[0], STACKS["a"])
