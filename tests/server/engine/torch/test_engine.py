"""Tests the engine's admission, cancellation and failures, and that it frees what requests held."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from server.engine.base import (
    BankFullError,
    Edit,
    EngineDeadError,
    EngineError,
    EngineStats,
    InvalidRequestError,
    QueueFullError,
    Request,
    SamplingSettings,
    ShuttingDownError,
    StepFailedError,
    StepOutput,
    UnservableInterventionError,
)
from server.engine.generation import DeliveredGeneration
from server.engine.text.detokenizer import Detokenizer
from server.engine.torch import core
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import TINY_OPTIONS, LoadTiny, StartEngine
from tests.engines import close_checked, idle
from tests.serving import eventually
from tests.tiny import EOS, random_head, random_maps, tiny_tokenizer

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


async def test_a_finished_request_frees_everything(start_engine: StartEngine) -> None:
    engine = await start_engine(INTERVENTIONS)
    edits = (affine("a"), Edit("r", RewardSettings(0.5, 1)))
    generation = await submit(engine, request(SamplingSettings(5), PROMPT, *edits))
    outputs = await finish(generation)
    assert len(outputs) <= 5
    assert outputs[0].queue_seconds is not None
    assert all(output.queue_seconds is None for output in outputs[1:])
    await eventually(lambda: idle(engine))
    stats = replace(engine.stats(), measured_step_seconds=0, measured_edit_seconds=0)
    assert stats == EngineStats(
        running=0, waiting=0, kv_cache_usage=0, slots_used=2, prefix_cache_queries=len(PROMPT)
    )
    generation.cancel()  # does nothing after the end
    assert engine.ready


async def test_generation_stops_at_max_tokens_eos_and_stop_strings(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine({})
    outputs = await finish(await submit(engine, request(SamplingSettings(9, 0, ignore_eos=True))))
    text = "".join(output.text for output in outputs)
    assert len(outputs) == 9
    assert [output.finish_reason for output in outputs] == [None] * 8 + ["length"]
    engine._core._eos_tokens = frozenset({outputs[4].token_ids[0]})
    first = next(i for i, o in enumerate(outputs) if o.token_ids == outputs[4].token_ids)
    until_eos = await finish(await submit(engine, request(SamplingSettings(9, 0))))
    assert len(until_eos) == first + 1
    assert until_eos[-1].finish_reason == "stop"
    engine._core._eos_tokens = frozenset({EOS})
    stop = text[2:4]
    until_stop = await finish(
        await submit(engine, request(SamplingSettings(9, 0, ignore_eos=True, stop=(stop,))))
    )
    assert "".join(output.text for output in until_stop) == text[: text.index(stop)]
    assert until_stop[-1].finish_reason == "stop"
    await eventually(lambda: idle(engine))


async def test_a_seed_gives_the_same_text_whatever_else_runs(start_engine: StartEngine) -> None:
    engine = await start_engine(INTERVENTIONS)
    seeded = SamplingSettings(20, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)

    async def tokens(sampling: SamplingSettings, *edits: Edit) -> list[int]:
        outputs = await finish(await submit(engine, request(sampling, PROMPT, *edits)))
        return [token for output in outputs for token in output.token_ids]

    alone = await tokens(seeded)
    beside, *_ = await asyncio.gather(
        tokens(seeded),
        *(tokens(SamplingSettings(20, seed=seed), affine("a")) for seed in range(5)),
    )
    assert beside == alone
    other = SamplingSettings(20, temperature=1.0, top_p=0.9, seed=8, ignore_eos=True)
    assert await tokens(other) != alone


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_cancelled_request_frees_everything(start_engine: StartEngine, after: int) -> None:
    engine = await start_engine(INTERVENTIONS, options=EngineOptions(kv_cache_gb=0.02))
    generation = await submit(engine, request(ENDLESS, PROMPT, affine("a")))
    outputs = aiter(generation)
    for _ in range(after):
        await anext(outputs)
    generation.cancel()
    with pytest.raises(EngineError, match="cancelled"):
        async for _ in outputs:
            pass
    await eventually(lambda: idle(engine))


async def test_a_client_that_leaves_during_admission_leaves_nothing_behind(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine(INTERVENTIONS)
    for delay in (0, 0, 0.001, 0.002, 0.004, 0.01):
        task = asyncio.create_task(submit(engine, request(ENDLESS, PROMPT, affine("a"))))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).cancel()
    await eventually(lambda: idle(engine))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "says"),
    [
        ((), 1, "prompt", "empty"),
        ((1,) * 512, 1, "prompt", "512 in the prompt"),
        ((1,) * 600, 1, "prompt", "600 in the prompt"),
        ((1,) * 500, 13, "max_tokens", "500 in the prompt; 13 for the completion"),
        ((1, 259), 1, "prompt", r"0\.\.258"),
        ((1, -1), 1, "prompt", r"0\.\.258"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_and_says_why(
    start_engine: StartEngine, prompt: tuple[int, ...], max_tokens: int, param: str, says: str
) -> None:
    engine = await start_engine({})
    with pytest.raises(InvalidRequestError, match=says) as refused:
        await submit(engine, request(SamplingSettings(max_tokens), prompt))
    assert refused.value.param == param
    assert idle(engine)


async def test_the_longest_request_is_served(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    sampling = SamplingSettings(12, 0, ignore_eos=True)
    assert len(await finish(await submit(engine, request(sampling, (1,) * 500)))) == 12


def paused(engine: TorchEngine) -> Callable[[], None]:
    """Keep the engine thread from stepping until the returned function is called."""
    resume = threading.Event()
    engine._thread.call(lambda: resume.wait(20))
    return resume.set


async def test_the_queue_is_bounded(start_engine: StartEngine) -> None:
    options = EngineOptions(kv_cache_gb=0.02, max_batch_size=1, max_waiting=2)
    engine = await start_engine(INTERVENTIONS, options=options)
    running = await submit(engine, request())
    await anext(aiter(running))
    waiting = [await submit(engine, request(ENDLESS, PROMPT, affine("a"))) for _ in range(2)]
    with pytest.raises(QueueFullError):
        await engine.submit([request(), request()])
    with pytest.raises(QueueFullError):
        await submit(engine, request(ENDLESS, PROMPT, affine("a")))
    assert engine.stats().waiting == 2
    for generation in (running, *waiting):
        generation.cancel()
    await eventually(lambda: idle(engine))


async def test_idle_engines_admit_batch_plus_queue(
    start_engine: StartEngine,
) -> None:
    options = EngineOptions(kv_cache_gb=0.02, max_batch_size=8, max_waiting=2)
    engine = await start_engine(INTERVENTIONS, options=options)
    sampling = SamplingSettings(20, 0, ignore_eos=True)
    admitted = await asyncio.gather(
        *(submit(engine, request(sampling)) for _ in range(40)), return_exceptions=True
    )
    refused = [each for each in admitted if isinstance(each, BaseException)]
    assert all(isinstance(each, QueueFullError) for each in refused)
    assert len(admitted) - len(refused) >= 8 + 2
    for generation in admitted:
        if not isinstance(generation, BaseException):
            assert len(await finish(generation)) == 20


async def test_interventions_take_turns_in_the_bank(start_engine: StartEngine) -> None:
    options = EngineOptions(kv_cache_gb=0.02, max_loaded_interventions=1)
    engine = await start_engine(INTERVENTIONS, options=options)

    async def tokens(digest: str) -> list[int]:
        sampling = SamplingSettings(8, 0, ignore_eos=True)
        outputs = await finish(await submit(engine, request(sampling, PROMPT, affine(digest))))
        return [token for output in outputs for token in output.token_ids]

    first_a, first_b = await tokens("a"), await tokens("b")
    assert first_a != first_b
    assert (await tokens("a"), await tokens("b")) == (first_a, first_b)
    holder = await submit(engine, request(ENDLESS, PROMPT, affine("a")))
    with pytest.raises(BankFullError):
        await submit(engine, request(ENDLESS, PROMPT, affine("b")))
    holder.cancel()
    await eventually(lambda: idle(engine))
    assert await tokens("b") == first_b


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


async def test_requests_are_admitted_all_or_none(start_engine: StartEngine) -> None:
    options = EngineOptions(kv_cache_gb=0.02, max_waiting=3, max_loaded_interventions=2)
    engine = await start_engine(INTERVENTIONS, options=options)
    sampling = SamplingSettings(4, 0, ignore_eos=True)
    # An idle engine admits all requests of one call, even if they are more than the queue's bound.
    generations = await engine.submit([request(sampling)] * 5)
    assert [len(await finish(generation)) for generation in generations] == [4] * 5
    holder = await submit(engine, request(ENDLESS, PROMPT, affine("a")))
    two_new = [request(sampling, PROMPT, affine("b")), request(sampling, PROMPT, affine("wide"))]
    with pytest.raises(BankFullError):
        await engine.submit(two_new)
    assert engine._core.interventions.slots._pins.total() == 1
    assert len(engine._generations) == 1
    with pytest.raises(InvalidRequestError, match="3 interventions at once"):
        await engine.submit([*two_new, request(sampling, PROMPT, affine("a"))])
    holder.cancel()
    await eventually(lambda: idle(engine))
    assert [len(await finish(each)) for each in await engine.submit(two_new)] == [4, 4]


async def test_stacks_that_compete_for_slots_never_hold_and_wait(
    start_engine: StartEngine,
) -> None:
    """A request gets all of its slots or none, so that two requests never block each other."""
    options = EngineOptions(kv_cache_gb=0.02, max_loaded_interventions=2)
    engine = await start_engine(INTERVENTIONS, options=options)
    stacks = [("a", "b"), ("b", "wide"), ("wide", "a")] * 4

    async def client(stack: tuple[str, ...]) -> None:
        for _ in range(1000):
            try:
                edits = [affine(digest) for digest in stack]
                generation = await submit(engine, request(SamplingSettings(2, 0), PROMPT, *edits))
                await finish(generation)
            except BankFullError:
                await asyncio.sleep(0.002)
            else:
                return
        pytest.fail("never served")

    await asyncio.gather(*(client(stack) for stack in stacks))
    await eventually(lambda: idle(engine))


async def test_settings_that_do_nothing_are_never_loaded(load_tiny: LoadTiny) -> None:
    def source(digest: str) -> Parameters:
        raise AssertionError(f"{digest} was read")

    engine = TorchEngine(load_tiny(), source, TINY_OPTIONS)
    await engine.start()
    nothing = (
        Edit("a", AffineSettings(0.0)),
        Edit("a", AffineSettings(1e-60)),  # a strength that is 0 in float32
        Edit("r", RewardSettings(0.0, 5, 0.0)),
        Edit("r", RewardSettings(0.5, 0, 0.0)),
    )
    sampling = SamplingSettings(2, 0, ignore_eos=True)
    assert len(await finish(await submit(engine, request(sampling, PROMPT, *nothing)))) == 2
    assert engine.stats().slots_used == 0
    await close_checked(engine)


@pytest.mark.parametrize("digest", ["elsewhere", "dead"])
async def test_an_intervention_at_a_site_that_the_model_lacks_is_refused(
    start_engine: StartEngine, digest: str
) -> None:
    engine = await start_engine(INTERVENTIONS)
    for _ in range(2):
        with pytest.raises(UnservableInterventionError, match="no site"):
            await submit(engine, request(ENDLESS, PROMPT, affine("a"), affine(digest)))
    await eventually(lambda: idle(engine))


async def test_an_intervention_that_cannot_be_read_is_refused(load_tiny: LoadTiny) -> None:
    def source(digest: str) -> Parameters:
        raise OSError("the disk is gone")

    engine = TorchEngine(load_tiny(), source, TINY_OPTIONS)
    await engine.start()
    with pytest.raises(UnservableInterventionError, match="the disk is gone"):
        await submit(engine, request(ENDLESS, PROMPT, affine("a")))
    assert engine.ready
    await close_checked(engine)


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


async def test_an_edit_that_leaves_no_finite_logits_fails_its_own_request_only(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine(INTERVENTIONS)
    sampling = SamplingSettings(40, 0, ignore_eos=True, logprobs=1)
    neighbour = asyncio.create_task(submit(engine, request(sampling)))
    overflow = Edit("a", AffineSettings(3e38))
    with pytest.raises(InvalidRequestError, match="weaker settings") as failure:
        await finish(await submit(engine, request(sampling, PROMPT, overflow)))
    assert failure.value.param == "steering"
    assert len(await finish(await neighbour)) == 40
    await eventually(lambda: idle(engine))


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


async def test_text_and_tokens(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    tokens = engine.tokenize("héllo")
    assert tiny_tokenizer().decode(tokens) == "héllo"
    assert engine.max_model_len == 512


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

    def failing(*arguments: object) -> Detokenizer:
        made.append(arguments)
        if len(made) == 2:
            raise MemoryError
        return Detokenizer(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("server.engine.text.answer_text.Detokenizer", failing)
    with pytest.raises(MemoryError):
        await engine.submit([request(ENDLESS, PROMPT, affine("a"))] * 3)
    assert len(made) == 2
    assert idle(engine)


async def test_outputs_that_were_read_are_not_waited_for_again(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    generation = await submit(engine, request(SamplingSettings(3, 0, ignore_eos=True)))
    assert len(await finish(generation)) == 3
    async with asyncio.timeout(5):
        assert await finish(generation) == []
