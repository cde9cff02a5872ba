"""Tests of health, readiness and version, and of the engine's start and end with the app."""

import asyncio

import httpx

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.serving import build_app, complete, error_of, eventually


async def test_health_and_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ready"}
    version = (await client.get("/version")).json()
    assert set(version) == {"version"}
    assert version["version"]


async def test_a_dead_engine_is_not_ready(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    await tiny_engine.close()
    ready = await client.get("/ready")
    assert ready.status_code == 503
    assert error_of(ready)["code"] == "not_ready"
    assert (await client.get("/health")).status_code == 200
    response = await complete(client)
    assert response.status_code == 503
    assert error_of(response)["code"] == "not_ready"


async def test_an_engine_that_is_closed_ends_what_runs(
    client: httpx.AsyncClient, tiny_engine: TorchEngine
) -> None:
    running = [
        asyncio.create_task(complete(client, max_tokens=500, ignore_eos=True, stream=stream))
        for stream in (False, True)
    ]
    async with asyncio.timeout(20):
        await eventually(lambda: tiny_engine.stats().running == 2)
        await tiny_engine.close()
        plain, stream = await asyncio.gather(*running)
    assert plain.status_code == 503
    assert error_of(plain)["code"] == "shutting_down"
    assert "shutting_down" in stream.text
    assert "[DONE]" not in stream.text


async def test_the_application_starts_and_closes_its_engine(
    load_tiny: LoadTiny, registry: Registry
) -> None:
    engine = TorchEngine(load_tiny(), lambda digest: registry.load(digest).parameters, TINY_OPTIONS)
    app = build_app(engine, registry)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/ready")).status_code == 503
        async with app.router.lifespan_context(app):
            assert (await client.get("/ready")).status_code == 200
            assert (await complete(client)).status_code == 200
        assert not engine.ready
        assert (await client.get("/ready")).status_code == 503


async def test_an_engine_that_was_started_before_is_left_running(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(tiny_engine, registry)
    async with app.router.lifespan_context(app):
        pass
    assert tiny_engine.ready
