"""Tests decoding by replayed graphs: their contents, when they are made, and steps without them.

A graph holds the decoder of a decode step, for one number of rows, with the affine edits. The tests
run on a CPU, where a stand-in for CUDA graphs calls the captured function again. Tests on a GPU are
in `tests/cuda`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from server.engine.model.description import ModelLoadError
from server.engine.request import Edit
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda import graphs as cuda_graphs
from server.engine.torch.cuda.capture import CaptureError
from server.engine.torch.cuda.decode_inputs import DecodeInputs
from server.engine.torch.cuda.decoder_call import Decoder, DecoderCallError
from server.engine.torch.cuda.graphs import GraphRunner
from server.engine.torch.model import fallback
from server.engine.torch.step.graph_keys import GraphKey, buckets
from server.engine.torch.step.staged_runner import StagedRunner
from steering.bank import Bank
from steering.settings import AffineSettings
from tests.conftest import LoadTiny, StartEngine
from tests.paged import OPTIONS, EagerCapture, make_all, use_pages
from tests.serving import eventually
from tests.steered import (
    NEW_TOKENS,
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    generate,
    interventions_of,
    logprobs_of,
    tokens_of,
)
from tests.stepped import finish, sequence
from tests.tiny import random_maps

EDITED = ("base", "a", "b then a", "r", "a and r", "a support", "four")


def graphs_of(core: EngineCore) -> GraphRunner:
    assert isinstance(core._runner, GraphRunner)
    return core._runner


def test_replayed_steps_give_the_bits_of_steps_that_are_not(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch fills its graph's size, so that shapes are equal with and without graphs."""
    capture = use_pages(monkeypatch)

    def logprobs(core: EngineCore) -> list[list[float]]:
        sequences = [sequence(PROMPTS[0], STACKS[name]) for name in EDITED]
        sequences.append(sequence(PROMPTS[0], STACKS["wide"]))
        return [logprobs_of(each) for each in finish(core, sequences)]

    # All prompts are prefilled in one step, so that all sequences decode together to the end.
    options = replace(
        OPTIONS, dose_interval=0, prefix_cache=False, max_batch_tokens=512, prefill_tokens=512
    )
    replayed = build_core(load_tiny(), options)
    eager = build_core(load_tiny(), replace(options, cuda_graphs=False))
    assert type(eager._runner) is StagedRunner
    expected = logprobs(eager)
    assert logprobs(replayed) == expected
    make_all(replayed)
    before = capture.replayed
    assert logprobs(replayed) == expected
    assert capture.replayed >= before + NEW_TOKENS - 1


def test_other_settings_and_other_maps_need_no_other_graph(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), replace(OPTIONS, dose_interval=0, max_loaded_interventions=2))
    [outputs] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    captured = capture.captured
    seen = {tuple(tokens_of(outputs))}
    for digest, strength in (("a", 0.4), ("a", -0.5), ("b", 0.8), ("a", 0.7), ("b", 0.3)):
        edits = (Edit(digest, AffineSettings(strength)),)
        [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
        assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
        seen.add(tuple(tokens_of(outputs)))
    assert len(seen) > 4, "the settings of this test do nothing"
    assert capture.captured == captured


@pytest.mark.parametrize("later", ["attention", "inputs"])
def test_a_site_that_is_new_is_edited(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    captured = capture.captured
    edits = (Edit(later, AffineSettings(1.0)),)
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
    assert capture.captured == captured, "a step has waited for its graph"
    assert core.compiling
    make_all(core)
    assert capture.captured > captured
    before = capture.replayed
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
    assert capture.replayed > before
    assert not any(
        tokens_of(outputs) == tokens_of(each) for each in finish(core, [sequence(PROMPTS[0])])
    )


@pytest.mark.parametrize("later", ["supported", "gated"])
def test_supports_and_gates_at_default_sites_are_in_graphs_from_the_start(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    captured = capture.captured
    edits = (Edit(later, AffineSettings(1.0)),)
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
    assert capture.captured == captured
    assert capture.replayed >= captured + NEW_TOKENS - 1
    assert not core.compiling


@pytest.mark.parametrize("later", ["attention", "inputs"])
def test_who_needs_nothing_new_keeps_the_graphs_of_before(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    finish(core, [sequence(PROMPTS[0], (Edit(later, AffineSettings(1.0)),), tokens=1)])
    core._runner._pending.clear()  # type: ignore[attr-defined]
    before, captured = capture.replayed, capture.captured
    [outputs] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], STACKS["a"])
    assert capture.replayed >= before + NEW_TOKENS - 1
    assert capture.captured == captured


def test_deeper_stacks_than_memory_was_planned_for_have_no_graph(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    edits = tuple(Edit(digest, AffineSettings(0.4)) for digest in ("a", "b", "a"))
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
    assert core.compiling == 0


def test_a_model_that_gives_its_decoder_more_than_inputs_has_no_graph(load_tiny: LoadTiny) -> None:
    """A graph would freeze an extra tensor that the model computes from one step's inputs."""
    model = load_tiny().model
    decoder = Decoder(model)
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, extra=torch.ones(1), **kwargs)
    inputs = DecodeInputs(GraphKey(rows=2, depth=0), 1, torch.device("cpu"))
    with pytest.raises(DecoderCallError, match="other inputs"):
        decoder.capture_call(model, inputs)


@pytest.mark.parametrize(("family", "path"), [("llama", "model"), ("gpt2", "transformer")])
def test_sites_outside_of_the_decoder_are_in_no_graph(
    load_tiny: LoadTiny, family: str, path: str
) -> None:
    decoder = Decoder(load_tiny(family).model)
    assert decoder.contains(f"{path}.layers.0")
    assert not decoder.contains(path), "its hooks are not its own code"
    assert not decoder.contains("lm_head")


def test_a_graph_that_nobody_can_use_any_longer_is_not_made(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), replace(OPTIONS, max_loaded_interventions=2))
    finish(core, [sequence(PROMPTS[0], STACKS["b then a"])])
    assert core.compiling
    for digest in ("r", "wide"):  # evict both interventions of the pending graph
        finish(core, [sequence(PROMPTS[0], STACKS[digest])])
    captured = capture.captured
    assert not core.make_pending()
    assert core.compiling == 0
    assert capture.captured == captured


def test_a_graph_that_cannot_be_made_later_is_done_without(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    finish(core, [sequence(PROMPTS[0], STACKS["b then a"])])

    def fail(*_: object) -> None:
        raise CaptureError("no memory")

    monkeypatch.setattr(type(capture), "__call__", fail)
    make_all(core)
    assert "--no-cuda-graphs: no memory" in caplog.text
    [outputs] = finish(core, [sequence(PROMPTS[0], STACKS["b then a"])])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], STACKS["b then a"])
    assert core.compiling == 0, "what cannot be made is wanted again"


@pytest.mark.parametrize("at_start", [False, True])
def test_a_device_that_has_failed_ends_the_engine(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, at_start: bool
) -> None:
    capture = use_pages(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "has_failed", lambda _device: True)
    monkeypatch.setattr(fallback, "has_failed", lambda _device: True)

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    if at_start:
        monkeypatch.setattr(type(capture), "__call__", fail)
        with pytest.raises(ModelLoadError, match="--no-cuda-graphs"):
            build_core(load_tiny(), OPTIONS)
        return
    core = build_core(load_tiny(), OPTIONS)
    finish(core, [sequence(PROMPTS[0], STACKS["b then a"])])
    monkeypatch.setattr(type(capture), "__call__", fail)
    with pytest.raises(torch.AcceleratorError):
        core.make_pending()


async def test_graphs_are_made_while_there_is_no_work(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    engine = await start_engine(interventions_of(), options=OPTIONS)
    captured = capture.captured
    await generate(engine, PROMPTS[0], STACKS["b then a"])
    await eventually(lambda: capture.captured > captured and not engine.stats().compiling)
    before = capture.replayed
    await generate(engine, PROMPTS[0], STACKS["b then a"])
    assert capture.replayed > before


def test_base_graphs_outlive_what_is_loaded(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    made = capture.captured
    # Each size has a graph without edits and one with an edit at the default sites.
    assert made == 2 * len(buckets(OPTIONS.max_batch_size)) == graphs_of(core).graphs
    core.interventions.slots.check({})
    for maps in core.interventions.bank._sites.values():
        assert not maps.table.flags.any()
    core.interventions.install("x", random_maps(1))
    core.interventions.slots.unpin("x")
    finish(core, [sequence(PROMPTS[0])])
    assert capture.captured == made


def test_the_first_maps_at_default_sites_find_their_graphs(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), replace(OPTIONS, dose_interval=2))
    made = capture.captured
    steered = [sequence(PROMPTS[0], STACKS["a"]) for _ in range(3)]
    finish(core, [*steered, sequence(PROMPTS[1])])
    assert capture.replayed > NEW_TOKENS
    assert capture.captured == made


def test_a_graph_that_gives_something_else_is_not_used(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = use_pages(monkeypatch)
    calls = type(capture).__call__

    def wrong(self: object, function: object) -> object:
        replay, (hidden, *others) = calls(self, function)  # type: ignore[arg-type]

        def replay_wrongly() -> None:
            replay()
            hidden.mul_(1.01)

        return replay_wrongly, [hidden, *others]

    monkeypatch.setattr(type(capture), "__call__", wrong)
    core = build_core(load_tiny(), OPTIONS)
    assert type(core._runner) is StagedRunner
    assert re.search(r"--no-cuda-graphs: .*off by", caplog.text)
    [outputs] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], STACKS["a"])


@pytest.mark.parametrize("fault", ["frozen", "unedited"])
def test_a_graph_that_follows_no_inputs_or_edits_nothing_is_not_used(
    load_tiny: LoadTiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    capture = use_pages(monkeypatch)
    calls = type(capture).__call__

    def unedited(_bank: object, _site: str, output: Tensor, *_others: object) -> Tensor:
        return output

    def faulty(self: EagerCapture, function: Callable[[], Sequence[Tensor]]) -> object:
        if fault == "frozen":
            _replay, results = calls(self, function)
            return lambda: None, results

        def without_edits() -> Sequence[Tensor]:
            with monkeypatch.context() as patch:
                patch.setattr(Bank, "edit_site", unedited)
                return function()

        return calls(self, without_edits)

    monkeypatch.setattr(type(capture), "__call__", faulty)
    core = build_core(load_tiny(), replace(OPTIONS, dose_interval=0))
    assert type(core._runner) is StagedRunner
    assert re.search(r"--no-cuda-graphs: .*off by", caplog.text)
    [outputs] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], STACKS["a"])


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (64, (1, 2, 4, 8, 16, 32, 64)), (5, (1, 2, 4, 5))],
)
def test_buckets_are_powers_of_two_and_the_largest(most: int, expected: tuple[int, ...]) -> None:
    assert buckets(most) == expected


def test_a_replayed_step_runs_the_decoder_once(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph runs the decoder; computing logits from its hidden states must not run it again."""
    use_pages(monkeypatch)
    loaded = load_tiny()
    core = build_core(loaded, OPTIONS)
    core.admit([sequence(PROMPTS[0])], {})
    core.step()
    calls: list[int] = []
    layer: nn.Module = loaded.model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    core.step()
    assert len(calls) == 1
    core.clear()
