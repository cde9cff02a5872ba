"""Tests how the engine on vLLM ends, and what its workers had prepared: `make test-vllm`.

The tests in tests/server/engine ask of both engines what the protocol promises.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load, save

from server.config import ConfigurationError
from server.engine.errors import EngineDeadError, ShuttingDownError, UnservableInterventionError
from server.engine.request import Edit
from steering.settings import AffineSettings
from tests.both_engines import TIGHT, Subject, request, started
from tests.steered import GREEDY, STACKS, tokens_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
LONG = request(b"hello", STACKS["a"], replace(GREEDY, max_tokens=150))


@asynccontextmanager
async def engine_of_its_own(folder: Path) -> AsyncIterator[Subject]:
    """Start an engine that the test may end."""
    async with started(TIGHT[1], folder) as subject:
        assert subject.engine.ready
        yield subject


async def test_the_end_fails_what_runs(tmp_path: Path) -> None:
    async with engine_of_its_own(tmp_path) as subject:
        # The engine could edit this site, but was not told to prepare it.
        unprepared = (Edit("unprepared", AffineSettings(1.0)),)
        with pytest.raises(UnservableInterventionError, match=r"layers\.0\.mlp was not prepared"):
            await subject.submit(request(b"hello", unprepared))
        [generation] = await subject.submit(LONG)
        assert await subject.engine.close()
        with pytest.raises(ShuttingDownError):
            async for _ in generation:
                pass
        with pytest.raises(ShuttingDownError):
            await subject.submit(LONG)
        assert not subject.engine.died


async def test_a_worker_that_dies_ends_the_engine(tmp_path: Path) -> None:
    async with engine_of_its_own(tmp_path) as subject:
        assert len(tokens_of(await subject.answer(request(b"hello")))) == GREEDY.max_tokens
        [generation] = await subject.submit(LONG)
        worker_process().kill()
        with pytest.raises(EngineDeadError):
            async for _ in generation:
                pass
        assert subject.engine.died
        assert not subject.engine.ready
        with pytest.raises(EngineDeadError):
            await subject.submit(LONG)
    assert subject.engine.died


async def test_slots_are_kept_until_vllm_knows_that_a_request_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another intervention could be loaded into them, and vLLM would end."""
    async with engine_of_its_own(tmp_path) as subject:
        engine: Any = subject.engine
        heard = asyncio.Event()
        abort = engine._llm.abort

        async def slow_abort(name: str) -> None:
            await heard.wait()
            await abort(name)

        monkeypatch.setattr(engine._llm, "abort", slow_abort)
        [generation] = await subject.submit(LONG)
        async for _ in generation:
            break
        [running] = engine._running
        for _ in range(3):
            running.task.cancel()
            await asyncio.sleep(0.01)
            assert engine._slots.table.used == 1
            assert engine._running == {running}
        heard.set()
        await subject.settle()


async def test_a_vllm_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    setup = replace(TIGHT[1], kv_tokens=1)
    with pytest.raises(ConfigurationError, match="vLLM did not start; what its processes wrote"):
        async with started(setup, tmp_path):
            pass


async def test_the_self_test_finds_lost_edits_of_either_kind(tmp_path: Path) -> None:
    """Those that a compiled model does itself, and those that the operator does."""
    from server.engine.vllm.self_test import SelfTest  # noqa: PLC0415  it imports vLLM

    async with engine_of_its_own(tmp_path) as subject:
        engine: Any = subject.engine
        sites = engine._served.layout.sites
        for lost_with_gates in (False, True):

            async def call(
                method: str, arguments: tuple[Any, ...], lost: bool = lost_with_gates
            ) -> list[Any]:
                if method == "steering_load":
                    slot, name, artifact = arguments
                    arguments = (slot, name, _without_effect(artifact, sites[0], lost))
                return list(await engine._call(method, arguments))

            test = SelfTest(engine._llm, call, engine._served.layout, engine.model)
            with pytest.raises(ConfigurationError, match=f"an edit at {re.escape(sites[0])} does"):
                await test.run()


def _without_effect(artifact: bytes, site: str, has_gate: bool) -> bytes:
    """Return an artifact without effect at a site, if it has a gate, or if it has none."""
    tensors = load(artifact)
    if f"sites.{site}.weight" not in tensors or has_gate != any("gate" in key for key in tensors):
        return artifact
    tensors[f"sites.{site}.weight"].fill_(1)
    tensors[f"sites.{site}.bias"].zero_()
    return save(tensors)


def worker_process() -> psutil.Process:
    """Return the process of vLLM's newest worker: a grandchild, as vLLM's scheduler starts it."""
    workers = [
        process
        for scheduler in psutil.Process().children()
        for process in scheduler.children()
        if "resource_tracker" not in " ".join(process.cmdline())
    ]
    return max(workers, key=psutil.Process.create_time)
