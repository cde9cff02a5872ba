"""Tests of what HTTP clients see of two servers that share one registry folder."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from pydantic import JsonValue

from interventions.registry import Registry
from interventions.watch import polling
from server.engine.torch.engine import TorchEngine
from tests.catalogues import history_of
from tests.conftest import TINY_OPTIONS, LoadTiny, WriteArtifact
from tests.engines import close_checked
from tests.serving import Json, build_app, bytes_of, complete, error_of, eventually, push, text_of


@dataclass
class Replica:
    """One server: its registry, and an HTTP client of it."""

    registry: Registry
    client: httpx.AsyncClient

    async def list(self) -> list[Json]:
        """Return the server's list of interventions, followed by each one with its history."""
        listed = (await self.client.get("/v1/interventions")).json()["data"]
        shown = [await self.client.get(f"/v1/interventions/{each['name']}") for each in listed]
        return [*listed, *(each.json() for each in shown)]

    async def upload(self, path: Path, name: str) -> httpx.Response:
        files = {"file": ("x", bytes_of(path))}
        return await self.client.post("/v1/interventions", files=files, data={"name": name})


class Replicas:
    """Starts servers that share one registry folder."""

    def __init__(self, root: Path, load_tiny: LoadTiny, stack: AsyncExitStack) -> None:
        self.root = root
        self._load_tiny = load_tiny
        self._stack = stack

    async def start(self, *, watching: bool = False, **settings: JsonValue) -> Replica:
        """Start one more server; unless `watching`, no thread looks for changes by others."""
        registry = self._stack.enter_context(Registry(self.root))
        if watching:
            self._stack.enter_context(polling(registry))
        engine = TorchEngine(
            self._load_tiny(), lambda digest: registry.load(digest).parameters, TINY_OPTIONS
        )
        await engine.start()
        self._stack.push_async_callback(close_checked, engine)
        app = build_app(engine, registry, None, **settings)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        return Replica(registry, await self._stack.enter_async_context(client))


@pytest.fixture
async def replicas(tmp_path: Path, load_tiny: LoadTiny) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        yield Replicas(tmp_path / "shared", load_tiny, stack)


async def test_an_upload_is_served_everywhere_and_all_say_the_same(
    replicas: Replicas, affine_artifact: WriteArtifact
) -> None:
    one = await replicas.start(watching=True)
    two = await replicas.start(watching=True)
    await push(one.client, affine_artifact("maps"))
    await eventually(lambda: two.registry.known("maps"))
    steering = {"intervention": "maps"}
    text = await text_of(one.client, steering=steering)
    assert await text_of(two.client, steering=steering) == text
    assert text != await text_of(one.client)
    assert await one.list() == await two.list() != []
    await push(two.client, affine_artifact("maps", seed=1))
    await push(two.client, affine_artifact("other", seed=2))
    assert (await two.client.delete("/v1/interventions/maps")).status_code == 200
    await eventually(lambda: len(history_of(one.registry, "maps")) == 3)
    assert await one.list() == await two.list()
    answer = await complete(one.client, steering=steering)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "intervention_not_found")


async def test_a_deletion_right_after_an_upload_elsewhere(
    replicas: Replicas, affine_artifact: WriteArtifact
) -> None:
    """Requests of one client reach different servers behind a round-robin load balancer."""
    one, two = await replicas.start(), await replicas.start()
    await push(one.client, affine_artifact("maps"))
    digest = one.registry.resolve("maps").digest
    deleted = await two.client.delete("/v1/interventions/maps")
    assert deleted.json() == {"name": "maps", "digest": digest, "deleted": True}
    again = await one.client.delete("/v1/interventions/maps")
    assert (again.status_code, error_of(again)["param"]) == (404, "name")


async def test_a_default_is_kept_by_the_other_server(
    replicas: Replicas, affine_artifact: WriteArtifact
) -> None:
    one = await replicas.start()
    path = affine_artifact("maps")
    await push(one.client, path)
    two = await replicas.start(default_steering={"intervention": "maps"}, steering_policy="locked")
    text = await text_of(two.client)
    for answer in (
        await one.client.delete("/v1/interventions/maps"),
        await one.upload(affine_artifact("maps", seed=1), "maps"),
    ):
        error = error_of(answer)
        assert answer.status_code == 409, answer.text
        assert (error["code"], error["param"]) == ("intervention_in_use", "name")
        assert "Another server's default steering uses 'maps'" in str(error["message"])
    assert (await one.upload(path, "maps")).status_code == 200
    assert await text_of(two.client) == text
    assert (await two.client.get("/ready")).status_code == 200


async def test_a_folder_that_cannot_be_read_for_a_while(
    replicas: Replicas, affine_artifact: WriteArtifact
) -> None:
    server = await replicas.start()
    client, registry = server.client, server.registry
    await push(client, affine_artifact("maps"))
    await push(client, affine_artifact("other", seed=1))
    steering = {"intervention": "maps"}
    text = await text_of(client, steering=steering)  # the engine has loaded it now
    listed = await server.list()
    away = replicas.root.with_name("away")
    replicas.root.rename(away)
    registry.poll()
    registry.heartbeat()
    refused = [
        await client.get("/ready"),
        await complete(client, steering={"intervention": "other"}),
        await client.get("/v1/interventions/other/artifact"),
    ]
    for answer in refused:
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (503, "registry_unreadable"), answer.text
        assert str(replicas.root) not in answer.text
        assert "Retry-After" in answer.headers
    for answer in (
        await client.delete("/v1/interventions/other"),
        await server.upload(affine_artifact("new", seed=2), "new"),
    ):
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (503, "registry_unwritable"), answer.text
        assert "nothing was changed" in str(error["message"])
    assert await text_of(client, steering=steering) == text
    assert await server.list() == listed
    assert (await client.get("/health")).status_code == 200

    away.rename(replicas.root)
    registry.poll()
    assert (await client.get("/ready")).status_code == 200
    assert (await complete(client, steering={"intervention": "other"})).status_code == 200
    await push(client, affine_artifact("new", seed=2))


async def test_a_server_that_holds_the_lock_for_long(
    replicas: Replicas, affine_artifact: WriteArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interventions.changes.LOCK_SECONDS", 0.05)
    one, two = await replicas.start(), await replicas.start()
    path = affine_artifact("maps")
    await push(two.client, path)
    steering = {"intervention": "maps"}
    with one.registry._folder.locked():
        for answer in (
            await two.client.delete("/v1/interventions/maps"),
            await two.upload(path, "maps"),
        ):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "registry_busy")
            assert "Retry-After" in answer.headers
        assert (await complete(two.client, steering=steering)).status_code == 200
        assert (await two.client.get("/ready")).status_code == 200
    assert (await two.client.delete("/v1/interventions/maps")).status_code == 200
    assert list((replicas.root / "tmp").iterdir()) == []
