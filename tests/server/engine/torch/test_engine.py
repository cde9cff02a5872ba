"""Tests the engine's admission, cancellation and failures, and that it frees what requests held."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from server.engine.errors import (
    EngineDeadError,
    QueueFullError,
    ShuttingDownError,
    StepFailedError,
    UnservableInterventionError,
)
from server.engine.generation import DeliveredGeneration
from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.text.detokenizer import Detokenizer
from server.engine.torch import core
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loaded_interventions import Parameters
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import TINY_OPTIONS, LoadTiny, StartEngine
from tests.engines import close_checked, idle
from tests.serving import eventually
from tests.tiny import random_head, random_maps

PROMPT = tuple(b"hello world")
INTERVENTIONS: Mapping[str, Parameters] = {
    "a": random_maps(1),
    "b": random_maps(2),
    "r": random_head(3),
    "elsewhere": random_maps(4, sites=("model.layers.7.mlp",)),
    "wide": random_maps(6),
    "dead": random_maps(5, sites=("model.layers.0.dropped",)),
}
ENDLESS = SamplingSettings(400, temperature=0, ignore_eos=True)


def request(
    sampling: SamplingSettings = ENDLESS, prompt: tuple[int, ...] = PROMPT, *edits: Edit
) -> Request:
    return Request("test", prompt, sampling, edits)


def affine(digest: str) -> Edit:
    return Edit(digest, AffineSettings(1.0))


async def submit(engine: TorchEngine, one: Request) -> DeliveredGeneration:
    (generation,) = await engine.submit([one])
    return generation


async def finish(generation: DeliveredGeneration) -> list[StepOutput]:
    return [output async for output in generation]


def paused(engine: TorchEngine) -> Callable[[], None]:
    """Keep the engine thread from stepping until the returned function is called."""
    resume = threading.Event()
    engine._thread.call(lambda: resume.wait(20))
    return resume.set


async def test_two_requests_load_an_intervention_once(load_tiny: LoadTiny) -> None:
    loads: list[str] = []

    def source(digest: str) -> Parameters:
        loads.append(digest)
        return INTERVENTIONS[digest]

    engine = TorchEngine(load_tiny(), source, TINY_OPTIONS)
    await engine.start()
    sampling = SamplingSettings(2, 0)
    generations = await asyncio.gather(
        *(submit(engine, request(sampling, PROMPT, affine("a"))) for _ in range(4))
    )
    await asyncio.gather(*map(finish, generations))
    await close_checked(engine)
    assert loads == ["a"]


@pytest.mark.parametrize("digest", ["elsewhere", "dead"])
async def test_an_intervention_at_a_site_that_the_model_lacks_is_refused(
    start_engine: StartEngine, digest: str
) -> None:
    engine = await start_engine(INTERVENTIONS)
    for _ in range(2):
        with pytest.raises(UnservableInterventionError, match="no site"):
            await submit(engine, request(ENDLESS, PROMPT, affine("a"), affine(digest)))
    await eventually(lambda: idle(engine))


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(INTERVENTIONS)

    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    resume = paused(engine)
    submissions = [asyncio.create_task(submit(engine, request(ENDLESS, PROMPT))) for _ in range(2)]
    await asyncio.sleep(0.01)
    with monkeypatch.context() as broken:
        broken.setattr(engine._core._runner, "run", fail)
        resume()
        for submission in submissions:
            with pytest.raises(StepFailedError) as failure:
                await finish(await submission)
            assert "secret" not in str(failure.value)
    await eventually(lambda: idle(engine))
    assert len(await finish(await submit(engine, request(SamplingSettings(3, 0))))) == 3


async def test_penalties_are_freed_however_a_request_ends_and_leave_nothing_to_others(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(INTERVENTIONS)
    table = engine._core._penalties
    penalized = request(replace(ENDLESS, repetition_penalty=1.3, frequency_penalty=0.4))
    short = replace(penalized, sampling=replace(penalized.sampling, max_tokens=30))

    def fail(*_: object) -> None:
        raise RuntimeError

    alone = await finish(await submit(engine, short))
    await eventually(lambda: idle(engine))
    assert not table._segments
    cancelled, *others = await engine.submit([penalized] * 4)
    async for _ in cancelled:
        break
    assert len(table._segments) == 4
    cancelled.cancel()
    again = await finish(await submit(engine, short))
    assert [output.token_ids for output in again] == [output.token_ids for output in alone]
    with monkeypatch.context() as broken:
        broken.setattr(table, "_send", fail)
        for other in others:
            with pytest.raises(StepFailedError):
                await finish(other)
    await eventually(lambda: idle(engine))
    assert not table._segments


async def test_a_dead_engine_says_so_to_everybody(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(INTERVENTIONS)
    generation = await submit(engine, request())

    def die() -> None:
        raise SystemExit

    monkeypatch.setattr(engine._core, "step", die)
    with pytest.raises(EngineDeadError):
        await finish(generation)
    assert not engine.ready
    with pytest.raises(EngineDeadError):
        await submit(engine, request())


async def test_a_device_that_computes_nothing_more_ends_the_engine(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some CUDA errors recur in every later step, so the engine must report that it is dead."""
    engine = await start_engine(INTERVENTIONS)

    def broken(*_args: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._core._runner, "run", broken)
    monkeypatch.setattr(core, "has_failed", lambda _device: True)
    with pytest.raises(EngineDeadError):
        await finish(await submit(engine, request()))
    assert not engine.ready


async def test_closing_ends_what_runs(start_engine: StartEngine) -> None:
    engine = await start_engine(INTERVENTIONS)
    generation = await submit(engine, request())
    outputs = aiter(generation)
    await anext(outputs)
    await engine.close()

    async def rest() -> None:
        async for _ in outputs:
            pass

    with pytest.raises(ShuttingDownError):
        await rest()
    assert not engine.ready


async def test_an_intervention_of_another_width_is_refused(start_engine: StartEngine) -> None:
    wrong: Mapping[str, Parameters] = {
        "narrow maps": random_maps(1, width=7),
        "narrow head": random_head(2, width=7),
        "good": random_maps(3),
    }
    engine = await start_engine(wrong)
    for digest, settings in (
        ("narrow maps", AffineSettings(1.0)),
        ("narrow head", RewardSettings(0.5, 1)),
    ):
        with pytest.raises(UnservableInterventionError, match="7 numbers"):
            await submit(engine, request(ENDLESS, PROMPT, Edit(digest, settings)))
    sampling = SamplingSettings(2, 0, ignore_eos=True)
    assert len(await finish(await submit(engine, request(sampling, PROMPT, affine("good"))))) == 2


async def test_a_slow_read_delays_nobody_else_and_does_not_let_the_queue_grow(
    load_tiny: LoadTiny,
) -> None:
    go_on = threading.Event()

    def source(digest: str) -> Parameters:
        if digest == "a":
            assert go_on.wait(20)
        return INTERVENTIONS[digest]

    engine = TorchEngine(
        load_tiny(), source, replace(TINY_OPTIONS, max_batch_size=1, max_waiting=2)
    )
    await engine.start()
    sampling = SamplingSettings(2, 0, ignore_eos=True)
    slow = [
        asyncio.create_task(submit(engine, request(sampling, PROMPT, affine("a"))))
        for _ in range(2)
    ]
    await asyncio.sleep(0)
    assert len(await finish(await submit(engine, request(sampling, PROMPT, affine("b"))))) == 2
    with pytest.raises(QueueFullError, match="being admitted"):
        await engine.submit([request(sampling)] * 2)
    assert not any(task.done() for task in slow)
    go_on.set()
    for task in slow:
        assert len(await finish(await task)) == 2
    await close_checked(engine)


async def test_an_admission_that_fails_half_way_leaves_nothing_behind(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_engine(INTERVENTIONS)
    made = []

    def failing(*arguments: object, **options: object) -> Detokenizer:
        made.append(arguments)
        if len(made) == 2:
            raise MemoryError
        return Detokenizer(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("server.engine.text.answer_text.Detokenizer", failing)
    with pytest.raises(MemoryError):
        await engine.submit([request(ENDLESS, PROMPT, affine("a"))] * 3)
    assert len(made) == 2
    assert idle(engine)
