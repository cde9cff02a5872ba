"""Tests of `steerserve push`, `list`, `show` and `delete` against a running server."""

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.cli.registry_client import app
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.disk import FaultyDisk, watching
from tests.foreign_files import linear_state, write_control_vector, write_hooks
from tests.live import live
from tests.manifests import manifest_of
from tests.serving import build_app
from tests.tiny import SITES, WIDTH, random_maps


async def run(*arguments: str) -> Result:
    """Run one command in a thread, since its server runs on this thread's event loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, arguments)


@pytest.fixture
async def server(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """Run a server whose URL and keys the commands find in environment variables."""
    application = build_app(tiny_engine, registry, api_key="api", admin_key="admin")
    async with live(application) as server:
        monkeypatch.setenv("STEERSERVE_URL", server.url)
        monkeypatch.setenv("STEERSERVE_ADMIN_KEY", "admin")
        monkeypatch.setenv("STEERSERVE_API_KEY", "api")
        monkeypatch.setenv("COLUMNS", "200")
        yield


@pytest.mark.usefixtures("server")
async def test_the_life_of_an_intervention(
    affine_artifact: WriteArtifact, registry: Registry
) -> None:
    path = str(affine_artifact("maps"))
    pushed = await run("push", path)
    assert pushed.exit_code == 0, pushed.output
    digest = registry.resolve("maps").digest
    assert pushed.stdout.startswith(f"Stored maps (lineas, sha256:{digest})")
    again = await run("push", path)
    assert again.stdout.startswith("Already stored maps")
    named = await run("push", path, "--name", "other")
    assert "Stored other" in named.stdout

    listed = await run("list")
    for text in ("maps", "other", "affine", "lineas", "strength 1.0", digest[:12], "yes"):
        assert text in listed.stdout

    shown = await run("show", "maps")
    for text in ("maps", digest, "LlamaForCausalLM", "Apache-2.0", "stored"):
        assert text in shown.stdout

    deleted = await run("delete", "maps")
    assert deleted.stdout == "Deleted maps\n"
    assert [entry.name for entry in registry.entries()] == ["other"]


@pytest.mark.usefixtures("server")
async def test_json_for_machines(affine_artifact: WriteArtifact, registry: Registry) -> None:
    pushed = await run("push", str(affine_artifact("maps")), "--json")
    digest = registry.resolve("maps").digest
    assert json.loads(pushed.stdout)["digest"] == digest
    assert json.loads((await run("list", "--json")).stdout)["data"][0]["name"] == "maps"
    assert json.loads((await run("show", "maps", "--json")).stdout)["history"]
    assert json.loads((await run("delete", "maps", "--json")).stdout)["deleted"] is True


@pytest.mark.usefixtures("server")
async def test_errors_of_the_server_are_one_line(tmp_path: Path, registry: Registry) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_text("hello")
    for arguments, text in (
        (("show", "unknown"), 'There is no intervention "unknown". (HTTP 404)'),
        (("delete", "unknown"), 'There is no intervention "unknown". (HTTP 404)'),
        (("show", "../models"), "(HTTP 4"),
        (("push", str(broken)), "(HTTP 400)"),
        (("delete", "unknown", "--admin-key", "wrong"), "Incorrect key provided. (HTTP 401)"),
        (("list", "--api-key", "wrong"), "Incorrect key provided. (HTTP 401)"),
    ):
        result = await run(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert text in line
    assert not registry.entries()


@pytest.mark.usefixtures("server")
async def test_what_cannot_be_read_or_reached(tmp_path: Path, registry: Registry) -> None:
    missing = await run("push", str(tmp_path / "missing.safetensors"))
    assert missing.exit_code == 1
    assert "missing.safetensors: No such file or directory" in missing.stderr
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "nonsense", "http://["):
        result = await run("list", "--url", url)
        assert result.exit_code == 1
        [line] = result.stderr.splitlines()
        assert line.startswith(f"Error: Cannot reach {url}: ")


@pytest.mark.usefixtures("server")
async def test_warnings_are_shown(tmp_path: Path, tiny_engine: TorchEngine) -> None:
    path = tmp_path / "sibling.safetensors"
    maps = random_maps(0)
    model = replace(tiny_engine.model, id="org/sibling")
    write_artifact(path, manifest_of(maps, model, "sibling"), maps)
    result = await run("push", str(path))
    assert result.exit_code == 0
    assert 'Warning: It was fitted on "org/sibling"' in result.stderr


@pytest.fixture
def unprepared(tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine say that it was not prepared for the sites of artifacts."""
    model = replace(tiny_engine.model, unprepared_sites=dict.fromkeys(SITES, "--site x"))
    monkeypatch.setattr(tiny_engine, "model", model)


@pytest.mark.usefixtures("unprepared", "server")
async def test_what_is_stored_and_cannot_be_served_is_said(affine_artifact: WriteArtifact) -> None:
    result = await run("push", str(affine_artifact("maps")))
    assert result.exit_code == 0
    assert result.stdout.startswith("Stored maps")
    assert "It cannot be served: This server has not prepared the site" in result.stderr
    assert "no: This server has not" in (await run("list")).stdout


@pytest.mark.usefixtures("server")
async def test_a_full_disk_is_told_also_while_the_file_is_sent(
    tmp_path: Path, registry: Registry
) -> None:
    path = tmp_path / "large.safetensors"
    _make_sparse(path, 50_000_000)  # more than the sockets buffer before the server refuses it
    disk = FaultyDisk(1, errno.ENOSPC, lasting=True)
    with watching(tmp_path / "registry", disk.before):
        result = await run("push", str(path))
    assert disk.refused == ["write"]
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The registry's disk is full; nothing was changed. (HTTP 507)\n"
    )
    assert not list((tmp_path / "registry" / "tmp").iterdir())


def _make_sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.usefixtures("server")
async def test_a_file_of_another_project_is_named_with_the_command_that_imports_it(
    tmp_path: Path, registry: Registry
) -> None:
    vector = write_control_vector(tmp_path / "v.safetensors", {1: torch.ones(WIDTH)})
    folder = write_hooks(tmp_path / "maps", {SITES[0]: linear_state(0)})
    for path, command in ((vector, "control-vector"), (folder, "ml-lineas")):
        result = await run("push", str(path))
        assert result.exit_code == 1
        [line] = result.stderr.splitlines()
        assert f"steerserve import {command} {path} --model MODEL" in line
    assert not registry.entries()
