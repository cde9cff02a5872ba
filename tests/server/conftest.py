"""Fixtures that start either engine once for all tests that share it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.both_engines import Subject, started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Subject]:
    """Start the engine of a setup, to be shared by all tests with that setup."""
    async with started(request.param, tmp_path_factory.mktemp("engine")) as subject:
        yield subject


@pytest_asyncio.fixture(loop_scope="session")
async def subject(started_engine: Subject) -> AsyncIterator[Subject]:
    """Return the shared engine, and check that the test has left nothing in it."""
    yield started_engine
    await started_engine.settle()
