"""Tests steps that are replayed from CUDA graphs, and that steps do not wait for the GPU."""

from dataclasses import replace
from typing import TypeVar

import pytest

from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.model.transfer import to_host
from server.engine.torch.sampling import row_results
from server.engine.torch.sampling.postprocess import Delivery
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step.staged_runner import StagedRunner
from steering.settings import AffineSettings
from tests.cuda.devices import (
    MARKS,
    OPTIONS,
    LoadOnDevice,
    Replays,
    graphs_of,
    make_all,
    refuse_waits,
)
from tests.steered import NEW_TOKENS, PROMPTS, STACKS, interventions_of, logprobs_of
from tests.stepped import finish, sequence

T = TypeVar("T")

pytestmark = MARKS

# All prompts are prefilled in one step, so that all sequences decode together to the end.
TOGETHER = replace(
    OPTIONS, dose_interval=0, prefix_cache=False, max_batch_tokens=512, prefill_tokens=512
)


def test_replayed_steps_give_what_others_give(
    load_on_device: LoadOnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch fills its graph's size, so that shapes are equal with and without graphs."""
    names = ("base", "a", "b then a", "r", "a and r", "a support", "four", "wide")
    replays = Replays(monkeypatch)

    def logprobs(core: EngineCore) -> list[list[float]]:
        sequences = [sequence(PROMPTS[0], STACKS[name]) for name in names]
        return [logprobs_of(each) for each in finish(core, sequences)]

    eager = build_core(load_on_device(dtype="float32"), replace(TOGETHER, cuda_graphs=False))
    assert type(eager._runner) is StagedRunner
    others = logprobs(eager)
    core = build_core(load_on_device(dtype="float32"), TOGETHER)
    before = logprobs(core)
    make_all(core)
    replays.count = 0
    replayed = logprobs(core)
    assert replays.count >= NEW_TOKENS - 1
    for name, one, two, other in zip(names, before, replayed, others, strict=True):
        assert one == pytest.approx(other, abs=1e-3), name
        assert two == pytest.approx(other, abs=1e-3), name


def test_edits_in_graphs_follow_settings_without_another_capture(
    load_on_device: LoadOnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs that are made at start already hold one edit at the default sites."""
    replays = Replays(monkeypatch)
    core = build_core(
        load_on_device(), replace(OPTIONS, dose_interval=0, max_loaded_interventions=2)
    )
    made, seen = graphs_of(core).graphs, set()
    for digest, strength in (("a", 1.0), ("a", 0.4), ("b", 0.8), ("a", -0.5), ("b", 0.3)):
        edits = (Edit(digest, AffineSettings(strength)),)
        replays.count = 0
        [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
        assert replays.count >= NEW_TOKENS - 1
        seen.add(tuple(logprobs_of(outputs)))
    assert len(seen) == 5
    assert core.compiling == 0
    assert graphs_of(core).graphs == made


def test_new_sites_get_new_graphs(
    load_on_device: LoadOnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = Replays(monkeypatch)
    core = build_core(load_on_device(dtype="float32"), TOGETHER)
    [first] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    core.interventions.install("attention", interventions_of()["attention"])
    core.interventions.slots.unpin("attention")
    edits = STACKS["a tuple's first place"]
    [edited] = finish(core, [sequence(PROMPTS[0], edits)])
    assert logprobs_of(edited) != logprobs_of(first)
    assert core.compiling, "a graph of before has served a site that it does not edit"
    make_all(core)
    replays.count = 0
    [replayed] = finish(core, [sequence(PROMPTS[0], edits)])
    [again] = finish(core, [sequence(PROMPTS[0], STACKS["a"])])
    assert replays.count >= 2 * (NEW_TOKENS - 1)
    assert logprobs_of(replayed) == pytest.approx(logprobs_of(edited), abs=1e-3)
    assert logprobs_of(again) == pytest.approx(logprobs_of(first), abs=1e-3)


@pytest.mark.parametrize("graphs", [False, True])
def test_steps_wait_for_the_gpu_at_most_once(
    load_on_device: LoadOnDevice, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """With all graphs made, a step of prefill or decoding waits for the GPU at most once."""
    core = build_core(load_on_device(), replace(OPTIONS, cuda_graphs=graphs, dose_interval=2))

    def load() -> None:
        names = ("base", "a", "a and r", "four")
        asked = [
            Request("test", tuple(PROMPTS[0]), settings, STACKS["a"])
            for settings in (
                SamplingSettings(NEW_TOKENS, logprobs=2, prompt_logprobs=1),
                SamplingSettings(NEW_TOKENS, temperature=0.7, top_k=40),
                SamplingSettings(NEW_TOKENS, min_p=0.1, presence_penalty=0.5),
                SamplingSettings(NEW_TOKENS, repetition_penalty=1.2, temperature=0),
            )
        ]
        sequences = [sequence(PROMPTS[0], STACKS[name]) for name in names]
        finish(core, [*sequences, *map(Sequence.of, asked)])

    for _ in range(3):  # the prefix cache makes the schedules differ
        load()
        if graphs:
            make_all(core)
    step = core.step
    waits: list[int] = []

    def allowed(tree: T) -> T:
        refuse_waits(False)
        try:
            waits[-1] += 1
            return to_host(tree)
        finally:
            refuse_waits(True)

    def watched() -> list[Delivery]:
        waits.append(0)
        try:
            refuse_waits(True)
            return step()
        finally:
            refuse_waits(False)

    monkeypatch.setattr(row_results, "to_host", allowed)
    monkeypatch.setattr(core, "step", watched)
    replays = Replays(monkeypatch)
    load()
    assert len(waits) > 15
    assert max(waits) == 1
    assert replays.count >= (NEW_TOKENS // 2 if graphs else 0)
