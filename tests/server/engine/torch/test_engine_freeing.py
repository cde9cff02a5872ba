"""Tests that a failure while a request ends leaves nothing allocated, and the engine running."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.engine.output import StepOutput
from server.engine.request import Request, SamplingSettings
from server.engine.slots import SlotTable
from server.engine.torch.attention.slab import Slab
from server.engine.torch.build import build_core
from server.engine.torch.core import EngineCore
from server.engine.torch.kv_store import KVStore
from server.engine.torch.options import EngineOptions
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.scheduling.block_keys import KeyChain
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Scheduler
from server.engine.torch.scheduling.sequence import Sequence
from tests.conftest import TINY_OPTIONS, LoadTiny, StartEngine
from tests.engines import idle
from tests.serving import eventually
from tests.steered import PROMPTS, STACKS, interventions_of
from tests.stepped import finish
from tests.stepped import sequence as plain

SAMPLING = SamplingSettings(
    20, temperature=0, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.1
)
# Functions that only fill the prefix cache; they may fail before they have done anything.
OPTIONAL = (
    (Slab, "read"),
    (KeyChain, "first_keys"),
    (PrefixCache, "save"),
)
# Functions that free resources; the tests let them do so, and then raise.
FREEING = (
    (Scheduler, "remove"),
    (KVStore, "cache_and_free_lane"),
    (KVStore, "free_lane"),
    (Slab, "free"),
    (PenaltyTable, "free"),
    (SlotTable, "unpin"),
)


class NoMemoryError(RuntimeError):
    """Stands in for the RuntimeError that torch raises when memory is exhausted."""


def break_before(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    """Make a method raise before it does anything; return a list that grows with each call."""
    failed: list[str] = []

    def fail(*_: object, **__: object) -> None:
        failed.append(name)
        raise NoMemoryError(name)

    monkeypatch.setattr(owner, name, fail)
    return failed


def break_after(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    """Make a method raise after it is done; return a list that grows with each call."""
    failed: list[str] = []
    own: Callable[..., object] = getattr(owner, name)

    def fail(*args: object, **kwargs: object) -> None:
        own(*args, **kwargs)
        failed.append(name)
        raise NoMemoryError(name)

    monkeypatch.setattr(owner, name, fail)
    return failed


BREAKS = [(break_before, *each) for each in OPTIONAL] + [(break_after, *each) for each in FREEING]
each_break = pytest.mark.parametrize(
    ("break_it", "owner", "name"), BREAKS, ids=[f"{each[1].__name__}.{each[2]}" for each in BREAKS]
)
Break = Callable[[pytest.MonkeyPatch, type, str], list[str]]


def admitted(core: EngineCore) -> Sequence:
    """Admit a request that holds a slot, a lane, penalties and KV blocks; decode a few tokens."""
    made = Sequence.of(Request("x", tuple(PROMPTS[0]), SAMPLING, STACKS["a"]))
    core.admit([made], interventions_of())
    while len(made.tokens) < 36:
        core.step()
    return made


def assert_whole(core: EngineCore) -> None:
    """Assert that no request holds anything, and that a new request is answered."""
    core.check()
    assert not core.has_work
    assert core.interventions.slots._pins.total() == 0
    assert core.scheduler.pool.free_blocks == core.scheduler.pool.blocks
    assert not core.store.lanes
    assert not core._penalties._segments
    [outputs] = finish(core, [plain(PROMPTS[1])])
    assert outputs[-1].finish_reason == "length"
    core.check()


@each_break
def test_a_request_that_finishes_is_freed(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, break_it: Break, owner: type, name: str
) -> None:
    core = build_core(load_tiny(), replace(TINY_OPTIONS, check_invariants=False))
    ending = admitted(core)
    with monkeypatch.context() as broken:
        failed = break_it(broken, owner, name)
        outputs = []
        while ending in core._outputs:
            outputs += core.step()
        assert failed, "it was not reached"
    assert isinstance(outputs[-1][1], StepOutput)
    assert outputs[-1][1].finish_reason == "length"
    assert_whole(core)


@each_break
async def test_a_request_that_is_cancelled_is_freed_and_nothing_is_kept_silent(
    start_engine: StartEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_it: Break,
    owner: type,
    name: str,
) -> None:
    engine = await start_engine(interventions_of(), options=replace(TINY_OPTIONS))
    request = Request("x", tuple(PROMPTS[0]), replace(SAMPLING, max_tokens=400), STACKS["a"])
    [generation] = await engine.submit([request])
    outputs = aiter(generation)
    for _ in range(12):
        await anext(outputs)
    caplog.set_level(logging.WARNING)
    with monkeypatch.context() as broken:

        def cancel() -> list[str]:
            failed = break_it(broken, owner, name)
            [ending] = engine._core._outputs
            engine._thread.tell(lambda: engine._core.cancel(ending))
            return failed

        failed = await asyncio.wrap_future(engine._thread.call(cancel))
        await eventually(lambda: bool(failed))
        await asyncio.wrap_future(engine._thread.call(lambda: None))
    assert name in caplog.text
    assert "Error" in caplog.text
    generation.cancel()
    await asyncio.wrap_future(engine._thread.call(engine._core.check))
    await eventually(lambda: idle(engine))
    [again] = await engine.submit([replace(request, sampling=SAMPLING)])
    assert [output async for output in again][-1].finish_reason == "length"


def test_a_request_that_yields_leaves_no_memory_behind(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 16 * 256
    options = EngineOptions(kv_cache_gb=16 * block / 1e9, max_batch_size=4, check_invariants=True)
    core = build_core(load_tiny(), options)
    failed = break_before(monkeypatch, Slab, "read")
    answers = finish(core, [plain(PROMPTS[0][:20] + bytes([i]), tokens=90) for i in range(3)])
    assert core.scheduler.preemptions
    assert failed
    assert [outputs[-1].finish_reason for outputs in answers] == ["length"] * 3


def test_a_step_without_memory_for_all_frees_who_yielded_for_it(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 16 * 256
    options = EngineOptions(kv_cache_gb=16 * block / 1e9, max_batch_size=4)
    core = build_core(load_tiny(), options)
    sequences = [plain(PROMPTS[0][:20] + bytes([i]), tokens=90) for i in range(3)]
    core.admit(sequences, {})
    reserve = Slab.reserve

    def failing(slab: Slab, tokens: int) -> None:
        if core.scheduler.preemptions:
            raise torch.OutOfMemoryError("no memory")
        reserve(slab, tokens)

    with monkeypatch.context() as broken:
        broken.setattr(Slab, "reserve", failing)
        while not core.scheduler.preemptions:
            core.step()
        core.check()
    while core.has_work:
        core.step()
    assert_whole(core)


def test_a_cache_that_cannot_be_filled_is_emptied_and_one_warning_says_so(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = build_core(load_tiny(), TINY_OPTIONS)
    finish(core, [plain(PROMPTS[2])])
    assert len(core.store.prefixes)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        break_before(broken, Slab, "read")
        finish(core, [plain(PROMPTS[0])])
        assert len(core.store.prefixes) == 0
        finish(core, [plain(PROMPTS[3])])
    [record] = caplog.records
    assert "prefix cache" in record.message
    finish(core, [plain(PROMPTS[2])])
    assert len(core.store.prefixes), "it is filled again where there is memory"
