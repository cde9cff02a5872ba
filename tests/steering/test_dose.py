"""Tests doses: the size of an edit relative to the edited vector, ‖edit‖ / ‖activation‖."""

import time
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from server.engine.output import StepOutput
from server.engine.request import Edit, Request
from server.engine.torch.engine import TorchEngine
from server.engine.torch.model.loader import LoadedModel
from server.engine.torch.options import EngineOptions
from steering.bank import Bank
from steering.dose import MAX_DOSE, DoseMeter
from steering.route import Span, build_route
from steering.settings import AffineSettings, RewardSettings, SlottedEdit
from tests import oracles
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.engines import close_checked
from tests.steered import GREEDY, PROMPTS, STACKS, interventions_of
from tests.tiny import random_head, random_maps

CPU = torch.device("cpu")
WIDTH = 6
SITES = ("first", "second")
MAPS = random_maps(1, sites=SITES, width=WIDTH)
OTHER = random_maps(2, sites=SITES[:1], width=WIDTH)
HEAD = random_head(3, WIDTH)

AFFINE = SlottedEdit(1, AffineSettings(0.7))
ON_PROMPT = SlottedEdit(1, AffineSettings(0.7, "prompt"))
FIRST_SITE = SlottedEdit(2, AffineSettings(1.0))
REWARD = SlottedEdit(3, RewardSettings(0.5, 2))


def bank() -> Bank:
    bank = Bank(3, CPU)
    bank.put(1, MAPS)
    bank.put(2, OTHER)
    bank.put(3, HEAD)
    return bank


def measured(spans: list[Span], z: dict[str, Tensor], h: Tensor) -> list[tuple[float | None, ...]]:
    route = build_route(spans, CPU)
    meter = DoseMeter(sum(span.count for span in spans), len(h))
    for site, activations in z.items():
        bank().edit_site(site, activations, route, meter)
    bank().edit_rows(h, route, meter)
    return meter.doses_of(meter.sums(CPU), spans)


def test_each_edit_of_each_span_has_the_mean_of_its_own_tokens_and_sites() -> None:
    torch.manual_seed(0)
    z = {site: torch.randn(9, WIDTH) for site in SITES}
    h = torch.randn(3, WIDTH)
    spans = [
        Span(0, 2, 2, range(1), (AFFINE, REWARD)),
        Span(0, 3, 3, range(1, 1), ()),  # has no logits row and no edit
        Span(1, 2, 2, range(1, 2), (ON_PROMPT,)),  # its second token is generated, so not edited
        Span(5, 1, 2, range(2, 3), (ON_PROMPT, FIRST_SITE)),
        Span(0, 1, 5, range(3, 3), (REWARD,)),  # has no logits row, so no reward edit
    ]
    first = z["first"]

    def affine(site: str, place: int) -> float:
        edited = oracles.affine(z[site][place], MAPS[site], 0.7)
        return oracles.dose(z[site][place], edited)

    assert isinstance(REWARD.settings, RewardSettings)
    reward = oracles.dose(h[0], oracles.reward(h[0], HEAD, REWARD.settings))
    only_first = oracles.dose(first[7], oracles.affine(first[7], OTHER["first"], 1.0))
    expected: list[list[float | None]] = [
        [sum(affine(site, place) for site in SITES for place in (0, 1)) / 4, reward],
        [],
        [sum(affine(site, 5) for site in SITES) / 2],
        [None, only_first],
        [None],
    ]
    found = measured(spans, z, h)
    assert [list(doses) for doses in found] == [
        [None if dose is None else pytest.approx(dose, rel=1e-5) for dose in doses]
        for doses in expected
    ]


def test_the_second_of_a_stack_is_measured_on_what_the_first_left() -> None:
    torch.manual_seed(1)
    z = torch.randn(1, WIDTH)
    spans = [Span(0, 1, 1, range(0), (AFFINE, FIRST_SITE))]
    [doses] = measured(spans, {"first": z}, torch.zeros(0, WIDTH))
    once = oracles.affine(z[0], MAPS["first"], 0.7)
    twice = oracles.affine(once, OTHER["first"], 1.0)
    assert doses == pytest.approx((oracles.dose(z[0], once), oracles.dose(once, twice)), rel=1e-5)


def test_an_edit_of_nothing_is_a_number() -> None:
    """The dose of an edited zero vector is a finite maximum, so that means stay finite."""
    zero = torch.zeros(1, WIDTH)
    spans = [Span(0, 1, 1, range(1), (AFFINE, REWARD))]
    [doses] = measured(spans, dict.fromkeys(SITES, zero), zero)
    assert doses == (MAX_DOSE, MAX_DOSE)
    huge = torch.full((1, WIDTH), 1e30)  # its norm overflows in float32
    [doses] = measured(spans, dict.fromkeys(SITES, huge), huge)
    assert all(dose is not None and 0 <= dose <= MAX_DOSE for dose in doses)


async def outputs(engine: TorchEngine, prompt: bytes, edits: tuple[Edit, ...]) -> list[StepOutput]:
    (generation,) = await engine.submit([Request("test", tuple(prompt), GREEDY, edits)])
    return [output async for output in generation]


async def engine_with(loaded: LoadedModel, options: EngineOptions) -> TorchEngine:
    engine = TorchEngine(loaded, interventions_of().__getitem__, options)
    await engine.start()
    return engine


async def test_the_engine_tells_what_its_edits_did(load_tiny: LoadTiny) -> None:
    """The expected doses are computed from activations that hooks record before they are edited."""
    loaded = load_tiny()
    edit = Edit("a", AffineSettings(0.6))
    maps = interventions_of()["a"]
    assert not hasattr(maps, "w1")
    seen: list[tuple[str, Tensor]] = []

    def recorder(site: str) -> object:
        def record(_module: nn.Module, _args: object, output: Tensor) -> None:
            seen.append((site, output.detach().clone()[0]))

        return record

    handles = [
        loaded.model.get_submodule(site).register_forward_hook(recorder(site))  # type: ignore[arg-type]
        for site in maps
    ]
    engine = await engine_with(loaded, replace(TINY_OPTIONS, dose_interval=1))
    await outputs(engine, b"x", (edit,))  # probes the sites, so that this is not recorded below
    seen.clear()
    found = await outputs(engine, PROMPTS[0], (edit,))
    for handle in handles:
        handle.remove()
    steps = [seen[i : i + len(maps)] for i in range(0, len(seen), len(maps))]
    assert len(steps) == len(found) == GREEDY.max_tokens
    for step, output in zip(steps, found, strict=True):
        doses = [
            oracles.dose(z, oracles.affine(z, maps[site], 0.6))
            for site, activations in step
            for z in activations
        ]
        assert output.doses == pytest.approx((sum(doses) / len(doses),), rel=1e-4)
    await close_checked(engine)


async def test_what_the_edits_take_of_a_step(load_tiny: LoadTiny) -> None:
    engine = await engine_with(load_tiny(), replace(TINY_OPTIONS, dose_interval=1))
    await outputs(engine, PROMPTS[0], ())
    assert engine.stats().measured_step_seconds == 0
    began = time.perf_counter()
    await outputs(engine, PROMPTS[0], STACKS["four"])
    stats = engine.stats()
    taken = time.perf_counter() - began
    assert 0 < stats.measured_edit_seconds < stats.measured_step_seconds < taken
    await close_checked(engine)


def test_measuring_is_not_counted_among_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    meter = DoseMeter(1, 1)
    z = torch.ones(1, WIDTH)
    with meter.timing_edits():
        meter.add_reward_doses(0, z, 2 * z, torch.zeros(1, dtype=torch.int64))
    assert meter.measuring_seconds == 1
    assert meter.edit_seconds == 2  # three seconds in all, less one for measuring


@pytest.mark.parametrize(("interval", "measured"), [(0, 0), (5, 4), (16, 1)])
async def test_one_in_so_many_steered_steps_is_measured(
    load_tiny: LoadTiny, interval: int, measured: int
) -> None:
    engine = await engine_with(load_tiny(), replace(TINY_OPTIONS, dose_interval=interval))
    base = await outputs(engine, PROMPTS[0], ())
    steered = await outputs(engine, PROMPTS[0], STACKS["four"])
    assert not any(output.doses for output in base)
    assert len(steered) == 16
    found = [output.doses for output in steered if output.doses]
    assert len(found) == measured
    assert all(len(doses) == 4 for doses in found)
    await close_checked(engine)


async def test_measuring_changes_no_number(load_tiny: LoadTiny) -> None:
    answers = []
    for interval in (0, 1):
        engine = await engine_with(load_tiny(), replace(TINY_OPTIONS, dose_interval=interval))
        for edits in STACKS.values():  # one at a time, so that shapes are equal
            answer = await outputs(engine, PROMPTS[0], edits)
            assert any(output.doses for output in answer) == bool(interval and edits)
            answers += [replace(each, doses=(), queue_seconds=None) for each in answer]
        await close_checked(engine)
    half = len(answers) // 2
    assert answers[:half] == answers[half:]
