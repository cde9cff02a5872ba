"""Tests the engine with pages and replayed steps on a CPU, with slow stand-ins for GPU kernels.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits.
Tests on a GPU are in `tests/cuda`.
"""

from dataclasses import replace

import pytest

from server.engine.errors import StepFailedError
from server.engine.model.description import ModelLoadError
from server.engine.request import Edit
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from steering.settings import RewardSettings
from tests.conftest import LoadTiny
from tests.paged import OPTIONS, make_all, use_pages
from tests.steered import (
    NEW_TOKENS,
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    logprobs_of,
    tokens_of,
)
from tests.stepped import finish, sequence

EDITED = ("base", "a", "b then a", "r", "a and r", "a support", "four")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt-350m", "qwen3", "gemma2"])
def test_any_mix_in_one_batch_equals_the_oracle(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(family), OPTIONS)
    cases = [
        (PROMPTS[number % len(PROMPTS)], edits) for number, edits in enumerate(STACKS.values())
    ]
    # The steps run first without graphs, then as replays of graphs.
    for replayed in (0, NEW_TOKENS // 2):
        capture.replayed = 0
        outputs = finish(core, [sequence(prompt, edits) for prompt, edits in cases], family)
        for each, (prompt, edits) in zip(outputs, cases, strict=True):
            assert_equal_to_oracle(each, family, prompt, edits)
        assert capture.replayed >= replayed
        make_all(core)


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("rows", [3, 5])
def test_rows_that_pad_change_nothing(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    prompts = [PROMPTS[2][: 20 + number] for number in range(rows)]
    together = finish(core, [sequence(prompt, STACKS[name]) for prompt in prompts])
    for prompt, outputs in zip(prompts, together, strict=True):
        [alone] = finish(core, [sequence(prompt, STACKS[name])])
        assert tokens_of(alone) == tokens_of(outputs)
        assert logprobs_of(alone) == pytest.approx(logprobs_of(outputs), abs=1e-4)


def test_doses_are_measured_in_replayed_steps_too(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doses(core: EngineCore) -> list[float]:
        edits = STACKS["a"], STACKS["a and r"], STACKS["b then a"]
        outputs = finish(core, [sequence(PROMPTS[0], each) for each in edits])
        found = [output.doses for each in outputs for output in each]
        return [dose for each in found if each is not None for dose in each if dose is not None]

    # The prefix cache is off, so that the same tokens are edited each time.
    options = replace(OPTIONS, dose_interval=1, prefix_cache=False)
    expected = doses(build_core(load_tiny(), options))
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), options)
    assert doses(core) == pytest.approx(expected, rel=1e-3)
    make_all(core)
    before = capture.replayed
    assert doses(core) == pytest.approx(expected, rel=1e-3)
    assert len(expected) > 15
    assert capture.replayed > before + NEW_TOKENS - 2


def test_a_sequence_that_cannot_begin_gives_its_pages_back(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    memory = core.store.memory
    assert isinstance(memory, PagedMemory)
    free = len(memory.pool._free)

    def fail(*_args: object) -> None:
        raise RuntimeError("out of luck")

    core.admit([sequence(PROMPTS[0])], {})
    with monkeypatch.context() as patch:
        patch.setattr(core.store.prefixes, "load", fail)
        [(_, output)] = core.step()
    assert isinstance(output, StepFailedError)
    assert len(memory.pool._free) == free
    finish(core, [sequence(PROMPTS[0])])


def test_what_begins_alike_is_read_from_the_prefix_cache(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    prompt = PROMPTS[2] * 3  # more than a page
    assert len(prompt) > PAGE
    for name in ("base", "a", "base", "r", "a"):
        before = core.store.prefixes.hits
        [outputs] = finish(core, [sequence(prompt, STACKS[name])])
        assert_equal_to_oracle(outputs, "llama", prompt, STACKS[name])
    assert core.store.prefixes.hits - before > PAGE


def test_sequences_preempted_for_pages_finish(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pages(monkeypatch)
    pages = PagedMemory.probe_lanes + 1 + 3
    options = replace(OPTIONS, kv_cache_gb=pages * PAGE * 256 / 1e9, prefix_cache=False)
    core = build_core(load_tiny(), options)
    assert core.scheduler.pool.blocks == 3
    prompts = [(PROMPTS[2] * 3)[start : start + PAGE - 6] for start in range(3)]
    outputs = finish(core, [sequence(prompt, STACKS["a"]) for prompt in prompts])
    assert core.scheduler.preemptions > 0
    for prompt, each in zip(prompts, outputs, strict=True):
        assert_equal_to_oracle(each, "llama", prompt, STACKS["a"])


def test_memory_without_a_page_to_spare_is_refused(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pages(monkeypatch)
    with pytest.raises(ModelLoadError, match="single block"):
        build_core(load_tiny(), replace(OPTIONS, kv_cache_gb=1e-4))


def test_rewards_act_after_a_replayed_step(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = use_pages(monkeypatch)
    core = build_core(load_tiny(), OPTIONS)
    before = capture.captured
    edits = (Edit("r", RewardSettings(0.5, 5)),)
    [outputs] = finish(core, [sequence(PROMPTS[0], edits)])
    assert_equal_to_oracle(outputs, "llama", PROMPTS[0], edits)
    assert capture.captured == before, "a reward needs no graph of its own"
