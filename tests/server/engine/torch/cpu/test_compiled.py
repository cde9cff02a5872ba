"""Tests compiled layers against the oracle, and engines where compiling fails.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits. A graph is
a compiled decoder layer with edits at certain sites. Steps run uncompiled until it is made.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from server.engine.base import Edit, Request, StepOutput
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cpu import compiled
from server.engine.torch.engine import TorchEngine
from server.engine.torch.options import EngineOptions
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step import decoder
from steering.settings import AffineSettings
from tests.conftest import LoadTiny, StartEngine
from tests.oracles import Oracle
from tests.steered import (
    GREEDY,
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    expected_of,
    generate,
    interventions_of,
)
from tests.tiny import tiny_model

OPTIONS = EngineOptions(
    # 13 slots, as many as the recorded prefill has tokens: the compiler must not take the two
    # sizes for one.
    kv_cache_gb=0.02,
    compile_layers=True,
    compile_at_once=True,
    prefix_cache=False,
    max_loaded_interventions=12,
)
SECONDS = 120.0
# With compile_at_once, graphs for a stack are made as soon as a request uses it.
FEW: Mapping[str, tuple[Edit, ...]] = {
    name: STACKS[name]
    for name in ("base", "a", "a at another strength", "b", "a on the prompt", "r", "a and r")
}


def compiled_of(engine: TorchEngine) -> compiled.CompiledLayers:
    layers = engine._core._runner.compiled
    assert isinstance(layers, compiled.CompiledLayers)
    return layers


def everything_made(layers: compiled.CompiledLayers) -> bool:
    """Return whether the graphs of all expected and all used variants of layers are ready."""
    graphs = layers._graphs
    return all(graphs.has_graphs(variant) for variant in {*graphs._permanent, *graphs._used})


async def everything_compiled(engine: TorchEngine) -> None:
    assert await asyncio.to_thread(compiled_of(engine).wait, SECONDS), "it takes too long"


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # layers differ: window, attention scale
async def test_any_mix_on_compiled_layers_equals_the_oracle(
    start_engine: StartEngine, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(interventions_of(family), family, OPTIONS)
    for edits in FEW.values():  # runs uncompiled until the stack's graphs are made
        await generate(engine, PROMPTS[1], edits)
    await everything_compiled(engine)
    layers = compiled_of(engine)
    assert everything_made(layers), "some graphs could not be made"
    # Nothing runs uncompiled now.
    monkeypatch.setattr(layers._layers, "_originals", [pytest.fail] * 2)
    oracle = Oracle(tiny_model(family))
    cases = [(prompt, edits) for edits in FEW.values() for prompt in PROMPTS]
    mixed = await asyncio.gather(*(generate(engine, *case) for case in cases))
    for outputs, (prompt, edits) in zip(mixed, cases, strict=True):
        assert_equal_to_oracle(outputs, *expected_of(oracle, family, prompt, edits))


async def test_gates_and_inputs_are_compiled_too(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = (*STACKS["gated and supported"], *STACKS["inputs"])
    engine = await start_engine(interventions_of(), "llama", OPTIONS)
    await generate(engine, PROMPTS[1], edits)
    await everything_compiled(engine)
    layers = compiled_of(engine)
    assert everything_made(layers), "some graphs could not be made"
    # Nothing runs uncompiled now.
    monkeypatch.setattr(layers._layers, "_originals", [pytest.fail] * 2)
    outputs = await generate(engine, PROMPTS[0], edits)
    oracle = Oracle(tiny_model("llama"))
    assert_equal_to_oracle(outputs, *expected_of(oracle, "llama", PROMPTS[0], edits))


def logprobs_beside(core: EngineCore, *stacks: tuple[Edit, ...]) -> list[list[float]]:
    """Return the log-probabilities of equal prompts, one for each stack, computed in one batch."""
    sampling = replace(GREEDY, max_tokens=6)
    requests = [Request(f"{i}", tuple(PROMPTS[0]), sampling, each) for i, each in enumerate(stacks)]
    core.admit([Sequence.of(request) for request in requests], interventions_of())
    found: dict[str, list[float]] = {request.request_id: [] for request in requests}
    while core.has_work:
        for sequence, output in core.step():
            assert isinstance(output, StepOutput)
            found[sequence.id] += [token.chosen.logprob for token in output.logprobs]
    return list(found.values())


def test_who_is_not_steered_has_the_base_models_bits_whoever_else_is(load_tiny: LoadTiny) -> None:
    """A step with edits runs another graph than one without, yet an unsteered row stays equal."""
    core = build_core(load_tiny(), OPTIONS)
    layers = core._runner.compiled
    assert isinstance(layers, compiled.CompiledLayers)
    assert layers.wait(SECONDS)
    nothing = (Edit("a", AffineSettings(0.0)),)
    alone = logprobs_beside(core, (), (), ())
    assert alone == logprobs_beside(core, nothing, (), nothing)
    logprobs_beside(core, STACKS["a support"])
    assert layers.wait(SECONDS)
    for steered in ("a", "a support", "r"):
        assert alone[0] == logprobs_beside(core, (), STACKS[steered], ())[0] != []
        assert alone[2] == logprobs_beside(core, STACKS[steered], STACKS["a"], ())[2]


async def test_compiled_layers_tell_the_same_doses(start_engine: StartEngine) -> None:
    doses = []
    for compile_layers in (False, True):
        options = EngineOptions(
            kv_cache_gb=0.02,
            compile_layers=compile_layers,
            compile_at_once=True,
            dose_interval=1,
            prefix_cache=False,
        )
        engine = await start_engine(interventions_of(), "llama", options)
        if compile_layers:
            await everything_compiled(engine)
        found = []
        for name in ("a", "a and r", "a on the prompt"):
            outputs = await generate(engine, PROMPTS[0], STACKS[name])
            found += [dose for output in outputs for dose in output.doses if dose is not None]
        doses.append(found)
    assert len(doses[0]) > 20
    assert doses[1] == pytest.approx(doses[0], rel=1e-3)


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
    oracle = Oracle(tiny_model("llama"))
    assert_equal_to_oracle(outputs, *expected_of(oracle, "llama", PROMPTS[0], STACKS["a"]))


async def test_a_graph_that_is_wrong_for_a_layer_is_not_used(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny GPT-2 scales each layer's attention by a constant, so one graph cannot serve two.

    The patch makes the compiler believe that all layers have the same structure.
    """
    monkeypatch.setattr(decoder, "_signature", lambda _layer: "all alike")
    with caplog.at_level(logging.WARNING):
        engine = await start_engine(interventions_of("gpt2"), "gpt2", OPTIONS)
        await everything_compiled(engine)
    assert "what was compiled is off by" in caplog.text
    outputs = await generate(engine, PROMPTS[0], STACKS["a"])
    oracle = Oracle(tiny_model("gpt2"))
    assert_equal_to_oracle(outputs, *expected_of(oracle, "gpt2", PROMPTS[0], STACKS["a"]))


async def test_a_slot_that_is_filled_anew_steers_as_what_it_holds_now(
    start_engine: StartEngine,
) -> None:
    """The interventions differ in their sites too: `b` lacks a site of `a`."""
    # The model is made before the engine, whose compiler draws from the same random generator.
    oracle = Oracle(tiny_model("llama"))
    options = replace(OPTIONS, max_loaded_interventions=1)
    engine = await start_engine(interventions_of(), "llama", options)
    for _ in range(2):
        for name in ("a", "b", "a support", "a"):
            outputs = await generate(engine, PROMPTS[0], STACKS[name])
            expected = expected_of(oracle, "llama", PROMPTS[0], STACKS[name])
            assert_equal_to_oracle(outputs, *expected)
        await everything_compiled(engine)


def test_the_default_sites_are_compiled_before_anybody_asks(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), OPTIONS)
    assert core.compiling
    layers = core._runner.compiled
    assert isinstance(layers, compiled.CompiledLayers)
    assert layers.wait(SECONDS)
    assert core.compiling == 0
    assert {variant.depth for variant in layers._graphs._graphs} == {0, 1}
    assert everything_made(layers)
