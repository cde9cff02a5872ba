"""Tests probes of new sites: they run between steps, a few sites at a time.

A site is a module whose output or input is edited. A probe shows whether an edit at a site reaches
the logits. The sites that are probed together are a piece.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from server.engine.errors import ShuttingDownError, UnservableInterventionError
from server.engine.generation import DeliveredGeneration
from server.engine.request import Edit, Request
from server.engine.torch.engine import TorchEngine
from server.engine.torch.site_probes import SiteProbes
from steering.affine import AffineMap
from steering.hooks import SteeringHooks
from steering.settings import AffineSettings
from tests.conftest import LoadTiny, StartEngine
from tests.serving import eventually
from tests.steered import GREEDY, PROMPTS, assert_equal_to_stack, generate
from tests.tiny import random_maps

EDITS = (Edit("many", AffineSettings(0.1)),)


class Clock:
    """A fake clock, and a fake probe that advances it by a fixed time for each site."""

    def __init__(self, seconds_a_site: float) -> None:
        self.now = 0.0
        self.seconds_a_site = seconds_a_site
        self.pieces: list[list[str]] = []

    def probe(self, sites: frozenset[str]) -> frozenset[str]:
        self.pieces.append(sorted(sites))
        self.now += 0.01 + self.seconds_a_site * len(sites)
        return frozenset({"layer.3"} & sites)


class NoHooks(SteeringHooks):
    """Records the sites at which hooks are installed, without a model."""

    def __init__(self) -> None:
        self.installed: list[str] = []

    def install(self, site: str) -> None:
        self.installed.append(site)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(seconds_a_site=0.01)
    monkeypatch.setattr("server.engine.torch.site_probes.time.perf_counter", lambda: clock.now)
    return clock


SITES = [f"layer.{number}" for number in range(40)]


def pieces_of(clock: Clock, seconds: float) -> list[int]:
    """Probe all SITES in pieces of about `seconds`; return the number of sites of each piece."""
    probes = SiteProbes(NoHooks(), clock.probe, max_at_once=16)
    clock.pieces.clear()
    while probes.unprobed(SITES):
        probes.probe_some(SITES, seconds)
    assert sorted(itertools.chain.from_iterable(clock.pieces)) == sorted(SITES)
    return [len(piece) for piece in clock.pieces]


def test_pieces_grow_while_they_take_little_time_and_no_further_than_a_batch(clock: Clock) -> None:
    assert pieces_of(clock, seconds=10) == [1, 2, 4, 8, 16, 9]


def test_pieces_stay_as_short_as_they_may_take(clock: Clock) -> None:
    # A piece of 8 sites takes 0.09 s, which is too long in both cases; one of 4 takes 0.05 s.
    assert pieces_of(clock, seconds=0.08)[:6] == [1, 2, 4, 8, 4, 8]
    assert pieces_of(clock, seconds=0.06)[:6] == [1, 2, 4, 4, 4, 4]


def test_pieces_that_take_too_long_become_shorter(clock: Clock) -> None:
    probes = SiteProbes(NoHooks(), clock.probe, max_at_once=16)
    for seconds in (10, 10, 10, 0, 0, 0, 0):
        probes.probe_some(SITES, seconds)
    assert [len(piece) for piece in clock.pieces] == [1, 2, 4, 8, 4, 2, 1]


def test_each_site_is_tried_once_and_its_outcome_is_kept(clock: Clock) -> None:
    hooks = NoHooks()
    probes = SiteProbes(hooks, clock.probe, max_at_once=16)
    probes.probe_all(SITES[:5])
    assert probes.dead(SITES) == ["layer.3"]
    assert not set(probes.unprobed(SITES)) & set(SITES[:5])
    assert probes.probe_some(SITES[:5], 1) == []
    assert hooks.installed == SITES[:5]
    assert clock.pieces == [SITES[:5]]


def all_sites(load_tiny: LoadTiny) -> dict[str, AffineMap]:
    """Return maps for the outputs of all of the tiny Llama's modules."""
    widths = load_tiny().description.site_widths
    outputs = [site for site in sorted(widths) if not site.endswith(".input")]
    return {site: random_maps(1, widths[site], (site,))[site] for site in outputs}


class Events:
    """Records an engine's steps and probes in their order, while a request decodes."""

    def __init__(
        self, engine: TorchEngine, running: DeliveredGeneration, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.running = running  # the request that decodes
        self.order: list[str] = []
        self.probed: list[str] = []
        core, probes = engine._core, engine._core.interventions._probes
        step, probe = core.step, probes._probe

        def probing(sites: frozenset[str]) -> frozenset[str]:
            self.order.append(f"probe {len(sites)}")
            self.probed += sites
            return probe(sites)

        def stepping() -> object:
            self.order.append("step")
            return step()

        monkeypatch.setattr(core, "step", stepping)
        monkeypatch.setattr(probes, "_probe", probing)

    def most_between_steps(self) -> int:
        """Return the largest number of sites probed between two steps; a request must still run."""
        assert not self.running.ended
        runs = itertools.groupby(self.order, key=lambda event: event == "step")
        return max(
            sum(int(event.removeprefix("probe ")) for event in events)
            for is_step, events in runs
            if not is_step
        )


@pytest.fixture
async def busy(
    start_engine: StartEngine, load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[TorchEngine, Events]]:
    """Start an engine that decodes for a request; a zero time limit keeps pieces at one site."""
    many = all_sites(load_tiny)
    engine = await start_engine({"many": many, "others": dict(list(many.items())[::2])})
    sampling = replace(GREEDY, max_tokens=480, logprobs=None)
    [running] = await engine.submit([Request("running", tuple(PROMPTS[1]), sampling)])
    await anext(aiter(running))
    prepare = engine._core.interventions.prepare
    monkeypatch.setattr(engine._core, "prepare", lambda parameters: prepare(parameters, 0.0))
    yield engine, Events(engine, running, monkeypatch)
    running.cancel()


async def test_steps_go_on_while_an_artifact_of_many_sites_comes(
    busy: tuple[TorchEngine, Events], load_tiny: LoadTiny
) -> None:
    engine, events = busy
    outputs = await generate(engine, PROMPTS[0], EDITS)
    assert sorted(events.probed) == sorted(all_sites(load_tiny))
    assert events.most_between_steps() == 1
    stack = [(all_sites(load_tiny), EDITS[0].settings)]
    assert_equal_to_stack(outputs, "llama", PROMPTS[0], stack)


async def test_requests_with_the_same_new_sites_share_the_probes(
    busy: tuple[TorchEngine, Events], load_tiny: LoadTiny
) -> None:
    engine, events = busy
    others = (Edit("others", AffineSettings(0.1)),)
    await asyncio.gather(*(generate(engine, PROMPTS[0], edits) for edits in (EDITS, EDITS, others)))
    assert sorted(events.probed) == sorted(all_sites(load_tiny))
    assert events.most_between_steps() == 1


async def test_a_request_that_is_cancelled_ends_its_probes(
    busy: tuple[TorchEngine, Events], load_tiny: LoadTiny
) -> None:
    engine, events = busy
    leaving = asyncio.create_task(generate(engine, PROMPTS[0], EDITS))
    await eventually(lambda: len(events.probed) > 2)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.wrap_future(engine._thread.call_piece(lambda: None))
    probed = len(events.probed)
    assert probed < len(all_sites(load_tiny))
    await generate(engine, PROMPTS[0], sampling=replace(GREEDY, max_tokens=5))
    assert len(events.probed) == probed
    assert engine._core.interventions.slots._pins.total() == 0


async def test_an_edit_that_reaches_nothing_is_refused_when_its_probe_has_shown_it(
    busy: tuple[TorchEngine, Events], load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, events = busy
    second = sorted(all_sites(load_tiny))[1]
    probes = engine._core.interventions._probes
    probe = probes._probe
    monkeypatch.setattr(probes, "_probe", lambda sites: probe(sites) | ({second} & sites))
    for _ in range(2):
        with pytest.raises(UnservableInterventionError, match=f"{second} does not reach"):
            await generate(engine, PROMPTS[0], EDITS)
    assert len(events.probed) == 2


async def test_a_request_whose_sites_are_probed_hears_that_the_engine_ends(
    busy: tuple[TorchEngine, Events],
) -> None:
    engine, events = busy
    waiting = asyncio.create_task(generate(engine, PROMPTS[0], EDITS))
    await eventually(lambda: len(events.probed) > 0)
    await engine.close()
    with pytest.raises(ShuttingDownError):
        await waiting
