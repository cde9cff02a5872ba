"""Tests of what HTTP clients see while the registry's disk is slow, full or failing."""

import asyncio
import errno
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest

from interventions.header import UnreadableArtifactError
from interventions.registry import Registry
from server.api import interventions
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient, WriteArtifact
from tests.disk import FOLDER_SYNC, FaultyDisk, SlowDisk, WatchedDisk, watching
from tests.serving import Json, bytes_of, complete, error_of, eventually, push, text_of

STEERED: Json = {"steering": {"intervention": "maps"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def leftovers(root: Path) -> list[Path]:
    return list((root / "tmp").iterdir())


def objects(root: Path) -> set[str]:
    return {path.stem for path in (root / "objects").rglob("*.safetensors")}


async def upload(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post("/v1/interventions", files={"file": ("x", content)})


@pytest.mark.parametrize("held", ["create", "write", "fsync", "replace", FOLDER_SYNC, "unlink"])
async def test_only_changes_of_the_registry_wait_for_a_slow_disk(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    tiny_engine: TorchEngine,
    registry: Registry,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: str,
) -> None:
    for seed, name in enumerate(("maps", "old", "gone")):
        await push(client, affine_artifact(name, seed))
    content = bytes_of(affine_artifact("new", seed=3))
    gone = registry.resolve("gone").digest
    fields: Json = {"steering": {"intervention": "gone"}, "max_tokens": 200, "ignore_eos": True}
    running = asyncio.create_task(text_of(client, **fields))
    await eventually(lambda: tiny_engine.stats().running == 1)
    await client.delete("/v1/interventions/gone")  # the running request still pins the bytes

    disk = SlowDisk(held)
    WatchedDisk(root, disk.before).install(monkeypatch)
    opened = _note_reads(monkeypatch, root, disk)
    changes = [
        asyncio.create_task(upload(client, content)),
        asyncio.create_task(client.delete("/v1/interventions/old")),
    ]
    await eventually(lambda: bool(disk.waiting))
    assert registry.path(gone).exists()
    assert await running  # when the request ends, it unpins the bytes whose name was deleted
    for _ in range(2):
        assert (await complete(client, **STEERED)).status_code == 200
        for path in ("", "/maps", "/maps/artifact"):
            assert (await client.get(f"/v1/interventions{path}")).status_code == 200
        for path in ("/v1/models", "/v1/models/tiny+maps", "/metrics", "/health", "/ready"):
            assert (await client.get(path)).status_code == 200
    refused = await complete(client, steering={"intervention": "gone"})
    assert refused.status_code == 404
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.gather(*changes)), 0.05)

    disk.go_on.set()
    stored, deleted = await asyncio.gather(*changes)
    assert (stored.status_code, deleted.status_code) == (201, 200)
    assert disk.on_the_loop == []
    assert opened
    names = [item["name"] for item in (await client.get("/v1/interventions")).json()["data"]]
    assert names == ["maps", "new"]
    await eventually(lambda: not registry.path(gone).exists())
    assert leftovers(root) == []


def _note_reads(monkeypatch: pytest.MonkeyPatch, root: Path, disk: SlowDisk) -> list[Path]:
    """Make `disk` watch reads too; return a list of the files opened, which grows."""
    opened: list[Path] = []
    operation = Path.open

    def watched(path: Path, mode: str = "r") -> BinaryIO:
        assert mode == "rb"
        if path.is_relative_to(root):
            opened.append(path)
            disk.before("open", path)
        return operation(path, "rb")

    monkeypatch.setattr(Path, "open", watched)
    return opened


async def test_many_uploads_to_a_disk_that_hangs_stop_nobody_else(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await push(client, affine_artifact("maps"))
    content = bytes_of(affine_artifact("new", seed=1))
    disk = SlowDisk("create")
    WatchedDisk(root, disk.before).install(monkeypatch)
    uploads = [asyncio.create_task(upload(client, content)) for _ in range(60)]
    await eventually(lambda: len(disk.waiting) >= 4)
    long = "a" * 100_000  # so long that a thread parses it, and too long for the model
    assert (await complete(client, prompt=long)).status_code == 400
    assert (await client.get("/metrics")).status_code == 200
    assert (await complete(client, **STEERED)).status_code == 200
    disk.go_on.set()
    assert {response.status_code for response in await asyncio.gather(*uploads)} == {200, 201}


async def test_hanging_readiness_checks_block_no_other_request(
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.add(affine_artifact("maps"))
    client = make_client(default_steering={"intervention": "maps"})
    go_on = threading.Event()
    where = registry.path

    def hangs(digest: str) -> Path:
        assert go_on.wait(60)
        return where(digest)

    monkeypatch.setattr(registry, "path", hangs)
    asked = [asyncio.create_task(client.get("/ready")) for _ in range(60)]
    await asyncio.sleep(0)
    assert (await client.get("/metrics")).status_code == 200
    go_on.set()
    assert {response.status_code for response in await asyncio.gather(*asked)} == {200}


@pytest.mark.parametrize(
    ("fails", "status", "code"),
    [
        (errno.ENOSPC, 507, "registry_full"),
        (errno.EDQUOT, 507, "registry_full"),
        (errno.EIO, 503, "registry_unwritable"),
        (errno.EROFS, 503, "registry_unwritable"),
    ],
)
async def test_an_upload_that_the_disk_refuses(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
    fails: int,
    status: int,
    code: str,
) -> None:
    old, new = affine_artifact("maps"), affine_artifact("maps", seed=1)
    refusals = 0
    number = 0
    disk = FaultyDisk(-1, fails, lasting=False)
    # Each round lets one further disk operation of the upload fail, until there is none left.
    while number <= len(disk.done):
        digest = (await push(client, old))["digest"]
        before = (await client.get("/v1/interventions/maps")).json()
        disk = FaultyDisk(number, fails, lasting=False)
        with watching(root, disk.before):
            response = await upload(client, bytes_of(new))
        if response.status_code != 201:
            assert response.status_code == status, disk.done
            error = error_of(response)
            assert (error["code"], error["type"]) == (code, "server_error")
            assert str(root) not in response.text
            assert leftovers(root) == []
            refusals += 1
            if "nothing was changed" in str(error["message"]):
                assert (await client.get("/v1/interventions/maps")).json() == before
                assert objects(root) == {digest}
            else:
                assert "a power cut may undo it" in str(error["message"])
        assert await text_of(client, **STEERED)
        assert (await client.delete("/v1/interventions/maps")).status_code == 200
        assert objects(root) == set()
        number += 1
    assert refusals > 5


async def test_an_upload_in_small_pieces_to_a_full_disk(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
) -> None:
    content = bytes_of(affine_artifact("maps"))
    request = client.build_request("POST", "/v1/interventions", files={"file": ("x", content)})
    body = await request.aread()

    async def pieces() -> AsyncGenerator[bytes]:
        for start in range(0, len(body), 97):
            yield body[start : start + 97]

    headers = {"Content-Type": request.headers["content-type"]}
    disk = FaultyDisk(4, errno.ENOSPC, lasting=True)
    with watching(root, disk.before):
        for _ in range(3):
            response = await client.post("/v1/interventions", content=pieces(), headers=headers)
            assert response.status_code == 507
            assert error_of(response)["message"] == (
                "The registry's disk is full; nothing was changed."
            )
            assert leftovers(root) == []
    assert "write" in disk.refused
    assert (await upload(client, content)).status_code == 201


async def test_deleting_on_a_full_disk(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
) -> None:
    await push(client, affine_artifact("maps"))
    with watching(root, FaultyDisk(0, errno.ENOSPC, lasting=True).before):
        assert (await client.delete("/v1/interventions/maps")).status_code == 200
        assert (await client.get("/v1/interventions/maps")).status_code == 404
        assert objects(root) == set()
        assert (await client.delete("/v1/interventions/maps")).status_code == 404
    await push(client, affine_artifact("maps"))
    history = (await client.get("/v1/interventions/maps")).json()["history"]
    assert [event["event"] for event in history] == ["stored", "deleted", "stored"]


async def test_deleting_where_the_disk_is_read_only(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
) -> None:
    await push(client, affine_artifact("maps"))
    with watching(root, FaultyDisk(0, errno.EROFS, lasting=True).before):
        response = await client.delete("/v1/interventions/maps")
        assert response.status_code == 503
        assert error_of(response)["code"] == "registry_unwritable"
        assert "Read-only file system" in str(error_of(response)["message"])
        assert await text_of(client, **STEERED)
    assert (await client.delete("/v1/interventions/maps")).status_code == 200


async def test_an_upload_that_cannot_be_read_back(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = bytes_of(affine_artifact("maps"))

    def unreadable(*_: object) -> object:
        raise UnreadableArtifactError("x cannot be read: Input/output error.")

    with monkeypatch.context() as patched:
        patched.setattr(interventions, "read_artifact", unreadable)
        response = await upload(client, content)
    assert response.status_code == 503
    assert error_of(response)["code"] == "registry_unwritable"
    assert leftovers(root) == []
    assert (await upload(client, content)).status_code == 201


async def test_a_download_whose_file_is_missing(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    await push(client, affine_artifact("maps"))
    digest = registry.resolve("maps").digest
    registry.path(digest).unlink()
    response = await client.get("/v1/interventions/maps/artifact")
    assert response.status_code == 500
    assert error_of(response)["code"] == "intervention_damaged"
    await push(client, affine_artifact("maps"))
    assert (await client.get("/v1/interventions/maps/artifact")).status_code == 200
    await client.delete("/v1/interventions/maps")
    assert not registry.path(digest).exists()  # deleted at once: the failed download left no pin
