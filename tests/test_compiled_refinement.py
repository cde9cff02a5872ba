"""Single rows refined by what a compiler has made, beside what it was made of."""

import asyncio
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.engine.torch import compiled_refinement
from server.engine.torch.background import Background
from server.engine.torch.build import EngineOptions
from server.engine.torch.compiled_refinement import CompiledRefinement
from steering.prepared_head import PreparedHead
from steering.refine import Headed, begin_one_row, refine
from steering.reward import RewardHead, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.conftest import StartEngine
from tests.oracles import Oracle
from tests.refinement import columns
from tests.steered import (
    PROMPTS,
    STACKS,
    assert_equal_to_oracle,
    expected_of,
    generate,
    interventions_of,
)
from tests.tiny import random_head, tiny_model

SECONDS = 120.0
WIDTH, UNITS = 96, 1024
SETTINGS = RewardSettings(eta=0.3, iterations=5, direction_scale=1.0)


def head_of(seed: int, units: int = UNITS) -> tuple[RewardHead, PreparedHead]:
    head = random_head(seed, WIDTH, units).to(torch.device("cpu"))
    assert head.prepared is not None
    return head, head.prepared


@pytest.fixture(scope="module")
def compiled() -> CompiledRefinement:
    """Made for heads of one shape."""
    background = Background("compiler")
    found = CompiledRefinement(background)
    _, prepared = head_of(0)
    assert found(prepared) is None, "nobody waits for a compiler"
    assert background.wait(SECONDS)
    assert found(prepared) is not None
    return found


def refined_by(
    head: RewardHead, settings: RewardSettings, rows: Tensor, compiled: CompiledRefinement
) -> Tensor:
    heads = [Headed(head, len(rows), settings.iterations)]
    with torch.inference_mode():
        found = columns([settings] * len(rows))
        return refine(rows, heads, *found, alike=True, compiled=compiled)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("iterations", [1, 5])
def test_a_row_is_refined_as_the_reference_has_it(
    compiled: CompiledRefinement, scale: float, iterations: int
) -> None:
    """By other heads than the one that it was compiled with; some rows' gaps are closed."""
    settings = replace(SETTINGS, direction_scale=scale, iterations=iterations)
    gaps = []
    for seed in range(12):
        head, prepared = head_of(seed)
        assert compiled(prepared) is not None
        row = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
        gaps.append(float(head.positive_reward - reward(head, row)))
        refined = refined_by(head, settings, row, compiled)
        expected = oracles.reward(row[0], head, settings)
        torch.testing.assert_close(refined[0], expected, rtol=1e-4, atol=1e-4)
    assert min(gaps) < 0 < max(gaps)


def test_rows_with_a_head_each_begin_one_after_the_other() -> None:
    """Of two widths, with settings of their own; each as the reference has it, and as alone."""
    background = Background("compiler")
    refinement = CompiledRefinement(background)
    heads = [head_of(seed, units)[0] for seed, units in ((1, 1024), (2, 200), (3, 1024))]
    settings = [replace(SETTINGS, iterations=steps) for steps in (5, 3, 2)]
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))

    def refined(some: slice) -> Tensor:
        headed = [
            Headed(head, 1, own.iterations)
            for head, own in zip(heads[some], settings[some], strict=True)
        ]
        scale, sizes = columns(settings[some])
        with torch.inference_mode():
            return refine(rows[some], headed, scale, sizes, bool(sizes.all()), refinement)

    refined(slice(None))  # asks
    assert background.wait(SECONDS)
    assert len(refinement._made) == 2
    together = refined(slice(None))
    for place, (row, head, own) in enumerate(zip(rows, heads, settings, strict=True)):
        torch.testing.assert_close(
            together[place], oracles.reward(row, head, own), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(refined(slice(place, place + 1))[0], together[place])


def test_what_is_compiled_is_used_for_heads_with_one_row_and_no_others() -> None:
    """So that a row's bits do not depend on whose rows are beside it, or how far they go."""
    calls: list[Tensor] = []

    def begin(h: Tensor, scale: Tensor, **head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(h)
        return begin_one_row(h, scale, **head)

    one, two, three = (head_of(seed)[0] for seed in (1, 2, 3))
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    steps = replace(SETTINGS, iterations=0)
    for counts, settings, expected in (
        ((1, 2, 1), [SETTINGS] * 4, [0, 3]),
        ((1, 1, 2), [steps, *[SETTINGS] * 3], [0, 1]),
        ((1, 2, 1), [steps] * 4, [0, 3]),
    ):
        calls.clear()
        most = max(each.iterations for each in settings)
        heads = [
            Headed(head, count, most) for head, count in zip((one, two, three), counts, strict=True)
        ]
        scale, sizes = columns(settings)
        found = refine(rows, heads, scale, sizes, bool(sizes.all()), lambda _head: begin)
        of_rows = [each.head for each in heads for _ in range(each.rows)]
        assert [each.tolist() for each in calls] == [rows[i : i + 1].tolist() for i in expected]
        for row, head, own, refined in zip(rows, of_rows, settings, found, strict=True):
            wanted = oracles.reward(row, head, own)
            torch.testing.assert_close(refined, wanted, rtol=1e-4, atol=1e-4)


def test_a_reward_that_is_not_a_number_shows(compiled: CompiledRefinement) -> None:
    large = replace(random_head(0, WIDTH, UNITS), w1=torch.full((UNITS, WIDTH), 3e38))
    head = large.to(torch.device("cpu"))
    row = torch.linspace(0.5, 1, WIDTH)[None]
    assert not refined_by(head, SETTINGS, row, compiled).isfinite().all()


def test_what_is_compiled_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        compiled_refinement,
        "compile_ahead",
        lambda *_, **__: lambda h, scale, **head: begin_one_row(h, -scale, **head),
    )
    background = Background("compiler")
    refinement = CompiledRefinement(background)
    _, prepared = head_of(0)
    refinement(prepared)
    assert background.wait(SECONDS)
    assert refinement(prepared) is None
    assert "rewards run uncompiled" in caplog.text


@pytest.mark.parametrize("stack", ["r", "r with other settings", "four"])
async def test_a_request_alone_is_refined_compiled_and_equals_the_oracle(
    start_engine: StartEngine, stack: str
) -> None:
    options = EngineOptions(kv_cache_gb=0.02, compile_layers=True, prefix_cache=False)
    engine = await start_engine(interventions_of(), "llama", options)
    await generate(engine, PROMPTS[0], STACKS[stack])  # asks for what it wants
    refinement = engine._core.interventions.bank.compiled_refinement
    layers = engine._core._runner.compiled
    assert isinstance(refinement, CompiledRefinement)
    assert layers is not None
    assert await asyncio.to_thread(layers.wait, SECONDS)
    assert refinement._made.keys() == refinement._asked != set()
    outputs = await generate(engine, PROMPTS[0], STACKS[stack])
    oracle = Oracle(tiny_model("llama"))
    assert_equal_to_oracle(outputs, *expected_of(oracle, "llama", PROMPTS[0], STACKS[stack]))
