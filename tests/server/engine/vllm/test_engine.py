"""Tests how the engine on vLLM ends, and what its workers had prepared: `make test-vllm`.

The tests in tests/server/engine ask of both engines what the protocol promises.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from server.engine.base import (
    Edit,
    EngineDeadError,
    ShuttingDownError,
    UnservableInterventionError,
)
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


def worker_process() -> psutil.Process:
    """Return the process of vLLM's newest worker: a grandchild, as vLLM's scheduler starts it."""
    workers = [
        process
        for scheduler in psutil.Process().children()
        for process in scheduler.children()
        if "resource_tracker" not in " ".join(process.cmdline())
    ]
    return max(workers, key=psutil.Process.create_time)
