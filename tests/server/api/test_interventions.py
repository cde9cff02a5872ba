"""Tests of the registry over HTTP: upload, list, show, download, delete, and refusals."""

import asyncio
import hashlib
import pickle
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.config import ConfigurationError
from server.engine.torch.engine import TorchEngine
from tests.artifact_samples import (
    Entry,
    affine_manifest,
    affine_parameters,
    entry,
    gate_entries,
    handmade,
    map_entries,
)
from tests.conftest import MakeClient, WriteArtifact
from tests.manifests import manifest_of
from tests.serving import (
    Json,
    bytes_of,
    complete,
    error_of,
    eventually,
    push,
    text_of,
)
from tests.tiny import SITES, random_maps


async def upload(
    client: httpx.AsyncClient, content: bytes, name: str | None = None
) -> httpx.Response:
    fields = {} if name is None else {"name": name}
    return await client.post("/v1/interventions", files={"file": ("x", content)}, data=fields)


def nothing_stored(registry: Registry, root: Path) -> bool:
    """Return whether the registry's folder holds no object, no name, and no staged file."""
    kept = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "leases"]
    return not registry.entries() and kept == [root / "lock"]


async def test_upload(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    path = affine_artifact("maps")
    content = bytes_of(path)
    response = await upload(client, content)
    assert response.status_code == 201
    body = response.json()
    digest = hashlib.sha256(content).hexdigest()
    assert body["name"] == "maps"
    assert (body["kind"], body["method"]) == ("affine", "lineas")
    assert (body["digest"], body["size"]) == (digest, len(content))
    assert (body["servable"], body["reason"], body["warnings"]) == (True, None, [])
    assert body["defaults"] == {"strength": 1.0, "positions": "all"}
    assert body["limits"] == {"strength": [0.0, 1.0]}
    assert body["base_model"]["hidden_size"] == 32
    assert body["description"] == "random, for tests"
    assert registry.resolve("maps").digest == digest
    again = await upload(client, content)
    assert again.status_code == 200
    assert again.json() == body


async def test_upload_under_another_name(
    client: httpx.AsyncClient, reward_artifact: WriteArtifact
) -> None:
    body = await push(client, reward_artifact("head"), name="other.name_1")
    assert body["name"] == "other.name_1"
    names = [item["name"] for item in (await client.get("/v1/interventions")).json()["data"]]
    assert names == ["other.name_1"]


async def test_the_name_may_come_after_the_file(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    content = bytes_of(affine_artifact("maps"))
    # httpx sends parts in this order; with None for a file name, "name" is an ordinary field.
    files = {"file": ("x", content), "name": (None, b"later")}
    response = await client.post("/v1/interventions", files=files)
    assert response.status_code == 201
    assert response.json()["name"] == "later"


async def test_an_upload_in_small_pieces(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    request = client.build_request(
        "POST", "/v1/interventions", files={"file": ("x", bytes_of(affine_artifact("maps")))}
    )
    body = await request.aread()

    async def pieces() -> AsyncGenerator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    headers = {"Content-Type": request.headers["content-type"]}
    response = await client.post("/v1/interventions", content=pieces(), headers=headers)
    assert response.status_code == 201


async def test_show_with_its_history(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    first = await push(client, affine_artifact("maps"))
    second = await push(client, affine_artifact("maps", seed=1))
    body = (await client.get("/v1/interventions/maps")).json()
    assert body["digest"] == second["digest"]
    assert [(event["event"], event["digest"]) for event in body["history"]] == [
        ("stored", first["digest"]),
        ("stored", second["digest"]),
    ]
    assert "training" in body
    old = (await client.get(f"/v1/interventions/sha256:{first['digest']}")).json()
    assert old["digest"] == first["digest"]


async def test_the_command_line_of_an_older_artifact_is_not_shown(
    client: httpx.AsyncClient, registry: Registry, tmp_path: Path, tiny_engine: TorchEngine
) -> None:
    maps = random_maps(0)
    training = {"command": "steerserve fit lineas --source /home/jane/toxic.txt", "steps": 3}
    manifest = manifest_of(maps, tiny_engine.model, "maps").model_copy(
        update={"training": training}
    )
    write_artifact(tmp_path / "maps.safetensors", manifest, maps)
    registry.add(tmp_path / "maps.safetensors")
    body = (await client.get("/v1/interventions/maps")).json()
    assert body["training"] == {"steps": 3}
    for path in ("/v1/interventions", "/v1/interventions/maps", "/v1/models"):
        assert "jane" not in (await client.get(path)).text


async def test_download_gives_the_uploaded_bytes(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    path = affine_artifact("maps")
    digest = (await push(client, path))["digest"]
    for reference, stem in (("maps", "maps"), (f"sha256:{digest}", "maps")):
        response = await client.get(
            f"/v1/interventions/{reference}/artifact", headers={"Range": "bytes=9999999-"}
        )
        assert response.status_code == 200
        assert response.content == bytes_of(path)
        assert response.headers["etag"] == f'"{digest}"'
        assert response.headers["content-disposition"] == (
            f'attachment; filename="{stem}.safetensors"'
        )


async def test_delete(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    digest = str((await push(client, affine_artifact("maps")))["digest"])
    assert await text_of(client, steering={"intervention": "maps"})
    response = await client.delete("/v1/interventions/maps")
    assert response.status_code == 200
    assert response.json() == {"name": "maps", "digest": digest, "deleted": True}
    assert not registry.path(digest).exists()
    for reference in ("maps", f"sha256:{digest}"):
        assert (await client.get(f"/v1/interventions/{reference}")).status_code == 404
        assert (await client.get(f"/v1/interventions/{reference}/artifact")).status_code == 404
        gone = await complete(client, steering={"intervention": reference})
        assert gone.status_code == 404
    again = await client.delete("/v1/interventions/maps")
    assert again.status_code == 404
    assert error_of(again)["code"] == "intervention_not_found"


async def test_a_digest_cannot_be_deleted(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    digest = (await push(client, affine_artifact("maps")))["digest"]
    response = await client.delete(f"/v1/interventions/sha256:{digest}")
    assert response.status_code == 400
    assert (await client.get("/v1/interventions/maps")).status_code == 200


async def test_a_request_that_runs_keeps_what_was_deleted(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    tiny_engine: TorchEngine,
    registry: Registry,
) -> None:
    await push(client, affine_artifact("maps"))
    digest = registry.resolve("maps").digest
    fields: Json = {"steering": {"intervention": "maps"}, "max_tokens": 200, "ignore_eos": True}
    expected = await text_of(client, **fields)
    running = asyncio.create_task(text_of(client, **fields))
    await eventually(lambda: tiny_engine.stats().running == 1)
    assert (await client.delete("/v1/interventions/maps")).status_code == 200
    assert registry.path(digest).exists()
    assert not running.done()
    assert await running == expected
    await eventually(lambda: not registry.path(digest).exists())


async def test_incompatible_intervention_is_listed_as_unservable(
    client: httpx.AsyncClient, registry: Registry, affine_artifact: WriteArtifact, tmp_path: Path
) -> None:
    await push(client, affine_artifact("maps"))
    path = tmp_path / "foreign.safetensors"
    write_artifact(path, affine_manifest("foreign"), affine_parameters())
    registry.add(path)
    foreign, maps = (await client.get("/v1/interventions")).json()["data"]
    assert (foreign["name"], foreign["servable"]) == ("foreign", False)
    assert 'no site "model.layers.0.norm"' in foreign["reason"]
    assert (maps["name"], maps["servable"], maps["reason"]) == ("maps", True, None)


@pytest.fixture
async def fixed_client(
    tiny_engine: TorchEngine, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> httpx.AsyncClient:
    """Make a client of a server whose engine edits the default sites only.

    It could have been started with the outputs of `mlp`, and with no other site.
    """
    others = [site for site in tiny_engine.model.site_widths if site not in SITES]
    possible = [site for site in others if site.endswith(".mlp")]
    model = replace(
        tiny_engine.model,
        unprepared_sites=dict.fromkeys(possible, "--site 'mlp'"),
        impossible_sites=dict.fromkeys(set(others) - {*possible}, "It is part of another."),
    )
    monkeypatch.setattr(tiny_engine, "model", model)
    return make_client()


def written(folder: Path, engine: TorchEngine, name: str, *sites: str) -> Path:
    """Write an artifact with maps at these sites."""
    maps = {
        site: each
        for site in sites
        for each in random_maps(0, engine.model.site_widths[site], (site,)).values()
    }
    path = folder / f"{name}.safetensors"
    write_artifact(path, manifest_of(maps, engine.model, name), maps)
    return path


UNSERVED = (
    (
        (*SITES, "model.layers.0.mlp", "model.layers.1.mlp"),
        'This server has not prepared the site "model.layers.0.mlp" and 1 more. Restart it, as it '
        "prepares the sites of all stored interventions when it starts, or add --site 'mlp' to its "
        "options.",
    ),
    (
        ("model.layers.0.mlp", "model.layers.1.self_attn.q_proj"),
        'This server cannot edit the site "model.layers.1.self_attn.q_proj". It is part of '
        "another.",
    ),
)


@pytest.mark.parametrize(("sites", "reason"), UNSERVED)
@pytest.mark.parametrize("pushed", [True, False])
async def test_an_intervention_at_sites_that_were_not_prepared_is_stored_and_never_served(
    fixed_client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    tiny_engine: TorchEngine,
    tmp_path: Path,
    sites: tuple[str, ...],
    reason: str,
    pushed: bool,
) -> None:
    """Uploaded here, or stored by another server of the same registry."""
    client = fixed_client
    await push(client, affine_artifact("maps"))
    path = written(tmp_path, tiny_engine, "other", *sites)
    if pushed:
        response = await upload(client, bytes_of(path))
        assert response.status_code == 201
        assert (response.json()["servable"], response.json()["reason"]) == (False, reason)
        assert (await upload(client, bytes_of(path))).json() == response.json()
    else:
        registry.add(path)
    maps, listed = (await client.get("/v1/interventions")).json()["data"]
    shown = (await client.get("/v1/interventions/other")).json()
    for body in (listed, shown):
        assert (body["name"], body["servable"], body["reason"]) == ("other", False, reason)
    assert maps["servable"]
    assert (await client.get("/v1/interventions/other/artifact")).content == bytes_of(path)
    ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert ids == ["tiny", "tiny+maps"]
    steerings: tuple[tuple[Json, str], ...] = (
        ({"steering": {"intervention": "other"}}, "steering.intervention"),
        ({"steering": {"intervention": "other", "strength": 0}}, "steering.intervention"),
        ({"steering": {"intervention": f"sha256:{shown['digest']}"}}, "steering.intervention"),
        (
            {"steering": [{"intervention": "maps"}, {"intervention": "other"}]},
            "steering[1].intervention",
        ),
        ({"model": "tiny+other"}, "model"),
    )
    for fields, param in steerings:
        response = await complete(client, **fields)
        error = error_of(response)
        assert response.status_code == 400, fields
        assert (error["code"], error["param"]) == ("intervention_not_servable", param)
        assert reason in str(error["message"])
    assert await text_of(client, steering={"intervention": "maps"}) != await text_of(client)
    assert (await client.delete("/v1/interventions/other")).status_code == 200


@pytest.mark.usefixtures("fixed_client")
async def test_a_default_at_sites_that_were_not_prepared_ends_the_start(
    make_client: MakeClient, registry: Registry, tiny_engine: TorchEngine, tmp_path: Path
) -> None:
    registry.add(written(tmp_path, tiny_engine, "other", "model.layers.0.mlp"))
    with pytest.raises(ConfigurationError, match="not prepared the site"):
        make_client(default_steering={"intervention": "other"})


async def test_models_name_what_can_be_served(
    make_client: MakeClient, affine_artifact: WriteArtifact
) -> None:
    client = make_client(served_model_names=["tiny", "org/tiny"])
    await push(client, affine_artifact("maps"))
    listed = (await client.get("/v1/models")).json()
    ids = [model["id"] for model in listed["data"]]
    assert listed["object"] == "list"
    assert ids == ["tiny", "org/tiny", "tiny+maps", "org/tiny+maps"]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert model["owned_by"] == "steerserve"
        assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        assert (await complete(client, model=model["id"])).status_code == 200
    unknown = await client.get("/v1/models/tiny+other")
    assert unknown.status_code == 404
    assert error_of(unknown)["code"] == "model_not_found"


async def test_a_name_that_is_a_path_stores_nothing(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry, tmp_path: Path
) -> None:
    content = bytes_of(affine_artifact("maps"))
    for name in ("../up", "a/b", "/etc/x", ".hidden", "", "A", "x" * 65, "a\x00b", "x" * 2000):
        response = await upload(client, content, name)
        assert response.status_code == 400, name
        assert error_of(response)["param"] == "name"
    assert nothing_stored(registry, tmp_path / "registry")


async def test_a_file_that_is_no_artifact_stores_nothing(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry, tmp_path: Path
) -> None:
    good = bytes_of(affine_artifact("maps"))
    wrong = {
        "empty": b"",
        "text": b"hello",
        "pickle": pickle.dumps({"a": 1}),
        "truncated": good[:-1],
        "longer": good + b"\0",
        "giant header": (2**62).to_bytes(8, "little") + good[8:],
        "zeros": bytes(1000),
        "not finite": good[:-4] + b"\x00\x00\xc0\x7f",
    }
    for what, content in wrong.items():
        response = await upload(client, content)
        error = error_of(response)
        assert response.status_code == 400, what
        assert (error["code"], error["param"]) == ("invalid_artifact", "file")
    assert nothing_stored(registry, tmp_path / "registry")
    assert (await upload(client, good)).status_code == 201


async def test_wrong_gates_and_inputs_store_nothing(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    await push(client, affine_artifact("maps"))
    before = (await client.get("/v1/interventions")).json()
    good = map_entries("a.norm") | gate_entries("a.norm")
    wrong: dict[str, dict[str, Entry]] = {
        "sites.b.gate.weight": good | gate_entries("b"),
        "sites.a.norm.gate.weight": good | {"sites.a.norm.gate.weight": entry([3], [1, 2, 3])},
        "sites.a.norm.gate.bias": good | {"sites.a.norm.gate.bias": entry([1], [1])},
        "sites.b.gate.bias": good | {"sites.b.gate.bias": entry([], [1])},
        "sites.a.norm.gate.low": good | {"sites.a.norm.gate.low": entry([2], [1, 2])},
        "sites.a.norm.input.weight": good | map_entries("a.norm.input"),
        "sites.input.bias": good | map_entries("input"),
    }
    for name, entries in wrong.items():
        response = await upload(client, handmade(entries), "bad")
        error = error_of(response)
        assert response.status_code == 400, name
        assert (error["code"], error["param"]) == ("invalid_artifact", "file")
        assert f'"{name}"' in str(error["message"])
        assert (await client.get("/v1/interventions")).json() == before
    assert error_of(await upload(client, handmade(good), "bad"))["code"] == "incompatible_artifact"


async def test_an_artifact_for_another_model_stores_nothing(
    client: httpx.AsyncClient, registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    write_artifact(path, affine_manifest("foreign"), affine_parameters())
    response = await upload(client, bytes_of(path))
    assert response.status_code == 400
    assert error_of(response)["code"] == "incompatible_artifact"
    assert nothing_stored(registry, tmp_path / "registry")


async def test_an_artifact_that_is_too_large(
    make_client: MakeClient, registry: Registry, tmp_path: Path
) -> None:
    client = make_client(max_artifact_bytes=1024)
    small = await upload(client, bytes(1024))  # allowed, but no artifact
    assert small.status_code == 400
    for size in (1025, 2_000_000):  # the file is too large, with or without its form
        response = await upload(client, bytes(size))
        assert response.status_code == 413, size
        assert error_of(response)["code"] == "request_too_large"
    assert nothing_stored(registry, tmp_path / "registry")


async def test_the_larger_limit_is_for_uploads_only(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=1024, max_artifact_bytes=100_000)
    assert (await upload(client, bytes(50_000))).status_code == 400
    for path in ("/v1/completions", "/v1/interventions/x", "/health"):
        assert (await client.post(path, content=bytes(50_000))).status_code == 413


@pytest.mark.parametrize("cut", [3, 40, 200, 1400])
async def test_an_upload_that_breaks_off_stores_nothing(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    tmp_path: Path,
    cut: int,
) -> None:
    request = client.build_request(
        "POST", "/v1/interventions", files={"file": ("x", bytes_of(affine_artifact("maps")))}
    )
    body = await request.aread()
    response = await client.post(
        "/v1/interventions",
        content=body[:-cut],
        headers={"Content-Type": request.headers["content-type"]},
    )
    assert response.status_code == 400
    assert nothing_stored(registry, tmp_path / "registry")


async def test_a_form_of_a_wrong_shape(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry, tmp_path: Path
) -> None:
    good = bytes_of(affine_artifact("maps"))
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    form = "multipart/form-data; boundary=b"
    end = b"\r\n--b--\r\n"
    wrong: dict[str, tuple[str, bytes, int]] = {
        "no form": ("application/octet-stream", good, 415),
        "json": ("application/json", b"{}", 415),
        "no boundary": ("multipart/form-data", good, 415),
        "long boundary": (f"multipart/form-data; boundary={'b' * 5000}", good, 400),
        "no part": (form, b"--b--\r\n", 400),
        "garbage": (form, b"garbage", 400),
        "no file": (form, part % (b"name", b"x") + b"--b--\r\n", 400),
        "two files": (form, (part % (b"file", good)) * 2 + b"--b--\r\n", 400),
        "misspelt": (form, part % (b"fiel", good) + b"--b--\r\n", 400),
        "many headers": (form, b"--b\r\n" + b"A: b\r\n" * 500 + b"\r\n", 400),
        "long headers": (form, b"--b\r\n" + (b"A: " + b"b" * 3000 + b"\r\n") * 3 + end, 400),
        "two good headers": (form, b"--b\r\n" + (b"A: " + b"b" * 3000 + b"\r\n") * 2 + end, 400),
    }
    says = {"long headers": "headers of a part", "two good headers": "fields are"}
    for what, (content_type, body, status) in wrong.items():
        response = await client.post(
            "/v1/interventions", content=body, headers={"Content-Type": content_type}
        )
        assert response.status_code == status, what
        assert says.get(what, "") in str(error_of(response)["message"]), what
    assert nothing_stored(registry, tmp_path / "registry")


async def test_damaged_bytes_are_never_served(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    await push(client, affine_artifact("maps"))
    path = registry.path(registry.resolve("maps").digest)
    content = bytearray(bytes_of(path))
    content[-1] ^= 1
    _overwrite(path, bytes(content))
    response = await complete(client, steering={"intervention": "maps"})
    assert response.status_code >= 400
    assert error_of(response)
    assert str(path.parent) not in response.text
    assert await text_of(client)


def _overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)
