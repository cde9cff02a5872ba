"""Tests that the default steering stays as it was at start, whatever happens to names and files."""

import asyncio
from pathlib import Path

import httpx
import pytest
import torch
from pydantic import JsonValue

import interventions.changes
from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.config import ConfigurationError
from server.engine.errors import StepFailedError, UnservableInterventionError
from server.engine.torch.engine import TorchEngine
from steering.affine import AffineMap
from tests.catalogues import names_of
from tests.conftest import LoadTiny, MakeClient, WriteArtifact
from tests.manifests import manifest_of
from tests.serving import Script, build_app, bytes_of, complete, error_of, push, text_of
from tests.tiny import random_maps


def identity(path: Path, load_tiny: LoadTiny) -> Path:
    """Write an artifact called "maps" that changes nothing at any strength; return its path."""
    maps = {
        site: AffineMap(torch.ones_like(each.weight), torch.zeros_like(each.bias))
        for site, each in random_maps(0).items()
    }
    write_artifact(path, manifest_of(maps, load_tiny().description, "maps"), maps)
    return path


async def upload(client: httpx.AsyncClient, path: Path, name: str) -> httpx.Response:
    files = {"file": ("x", bytes_of(path))}
    return await client.post("/v1/interventions", files=files, data={"name": name})


def assert_in_use(response: httpx.Response, name: str) -> None:
    error = error_of(response)
    assert response.status_code == 409, response.text
    assert (error["code"], error["param"]) == ("intervention_in_use", "name")
    assert f"default steering uses '{name}'" in str(error["message"])


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.mark.parametrize("policy", ["optional", "required", "locked"])
@pytest.mark.parametrize("by_digest", [False, True])
async def test_its_name_can_neither_go_nor_move(
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    load_tiny: LoadTiny,
    registry: Registry,
    tmp_path: Path,
    policy: str,
    by_digest: bool,
) -> None:
    path = affine_artifact("maps")
    digest = registry.add(path).digest
    default: JsonValue = {"intervention": f"sha256:{digest}" if by_digest else "maps"}
    client = make_client(default_steering=default, steering_policy=policy)
    expected = await text_of(client)
    others = (
        affine_artifact("maps", seed=1),
        affine_artifact("maps", seed=2, limits={"strength": (1, 1)}),
        reward_artifact("maps", seed=3),
        identity(tmp_path / "identity.safetensors", load_tiny),
    )
    assert_in_use(await client.delete("/v1/interventions/maps"), "maps")
    for other in others:
        assert_in_use(await upload(client, other, "maps"), "maps")
    assert (await upload(client, path, "maps")).status_code == 200  # the same bytes
    assert registry.resolve("maps").digest == digest
    assert (await client.get("/ready")).status_code == 200
    assert await text_of(client) == expected
    # The other artifacts may be stored under any other name.
    assert (await upload(client, others[0], "more")).status_code == 201
    assert (await upload(client, others[1], "more")).status_code == 201
    assert (await client.delete("/v1/interventions/more")).status_code == 200


async def test_one_of_two_names_may_go_where_it_was_given_by_its_digest(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    path = affine_artifact("maps")
    digest = registry.add(path).digest
    client = make_client(default_steering={"intervention": f"sha256:{digest}"})
    expected = await text_of(client)
    await push(client, path, "same")
    await push(client, affine_artifact("maps", seed=1))  # "same" keeps the default's digest
    assert_in_use(await client.delete("/v1/interventions/same"), "same")
    assert_in_use(await upload(client, affine_artifact("maps", seed=2), "same"), "same")
    await push(client, path, "third")
    assert (await client.delete("/v1/interventions/same")).status_code == 200
    assert_in_use(await client.delete("/v1/interventions/third"), "third")
    assert (await client.delete("/v1/interventions/maps")).status_code == 200
    assert await text_of(client) == expected
    restarted = make_client(default_steering={"intervention": f"sha256:{digest}"})
    assert await text_of(restarted) == expected


async def test_concurrent_deletes_keep_one_name_of_the_default(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    path = affine_artifact("maps")
    digest = registry.add(path).digest
    registry.add(path, "same")
    client = make_client(default_steering={"intervention": f"sha256:{digest}"})
    answers = await asyncio.gather(
        *(client.delete(f"/v1/interventions/{name}") for name in ("maps", "same"))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert len(names_of(registry, digest)) == 1


async def test_a_digest_of_a_names_past_is_kept_with_the_name(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    digest = registry.add(affine_artifact("maps")).digest
    registry.add(affine_artifact("maps", seed=1))
    default: JsonValue = {"intervention": f"sha256:{digest}"}
    client = make_client(default_steering=default, steering_policy="locked")
    expected = await text_of(client)
    assert_in_use(await client.delete("/v1/interventions/maps"), "maps")
    # A name that moves on keeps its earlier digests, the default's too, in its history.
    assert (await upload(client, affine_artifact("maps", seed=2), "maps")).status_code == 201
    assert await text_of(client) == expected
    assert await text_of(client, steering=default) == expected
    assert (await complete(client, model="tiny+maps")).status_code == 403
    assert await text_of(make_client(default_steering=default)) == expected


async def test_without_a_default_every_name_may_change(
    make_client: MakeClient, affine_artifact: WriteArtifact
) -> None:
    client = make_client()
    await push(client, affine_artifact("maps"))
    assert (await upload(client, affine_artifact("maps", seed=1), "maps")).status_code == 201
    assert (await client.delete("/v1/interventions/maps")).status_code == 200


@pytest.mark.parametrize("policy", ["optional", "required", "locked"])
async def test_default_stays_as_resolved_at_start(
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    """The refusal to move the default's name is off, as if a way around it had been found."""
    monkeypatch.setattr(interventions.changes, "check_default", lambda *_: None)
    entry = registry.add(affine_artifact("maps"))
    default: JsonValue = {"intervention": "maps", "strength": 0.5}
    client = make_client(default_steering=default, steering_policy=policy)
    before = (await complete(client, logprobs=2)).json()
    registry.add(affine_artifact("maps", seed=1, limits={"strength": (1, 1)}))
    moved = (await complete(client, logprobs=2)).json()
    registry.delete("maps")
    deleted = (await complete(client, logprobs=2)).json()
    for answer in (moved, deleted):
        assert answer["choices"] == before["choices"]
        assert answer["steering"] == before["steering"]
        assert answer["steering"][0]["digest"] == entry.digest
    assert registry.path(entry.digest).exists()
    assert (await client.get("/ready")).status_code == 200


async def test_damage_makes_the_server_unready_and_is_never_left_out(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    entry = registry.add(affine_artifact("maps"))
    other = registry.add(affine_artifact("other", seed=1))
    client = make_client(default_steering={"intervention": "maps"})
    path, whole = registry.path(entry.digest), bytes_of(registry.path(entry.digest))
    overwrite(registry.path(other.digest), b"damaged")
    assert (await client.get("/ready")).status_code == 200
    overwrite(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        for response in (await client.get("/ready"), await complete(client)):
            error = error_of(response)
            assert response.status_code == 503
            assert error["code"] == "default_steering_unavailable"
            assert "is stored but damaged" in str(error["message"])
            assert str(path.parent) not in response.text
    # A request that names the intervention gets the usual error; one that opts out is served.
    named = await complete(client, steering={"intervention": "maps"})
    assert error_of(named)["code"] == "intervention_damaged"
    assert (await complete(client, steering=None)).status_code == 200
    overwrite(path, whole)
    assert (await client.get("/ready")).status_code == 200
    assert (await complete(client)).status_code == 200
    path.unlink()
    assert (await client.get("/ready")).status_code == 503


async def test_damaged_default_prevents_start(
    tiny_engine: TorchEngine, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    path = registry.path(registry.add(affine_artifact("maps")).digest)
    overwrite(path, bytes_of(path)[:-4] + b"\0\0\0\0")
    with pytest.raises(ConfigurationError, match="'maps' is stored but damaged"):
        build_app(tiny_engine, registry, default_steering={"intervention": "maps"})


@pytest.mark.parametrize(
    "default",
    [
        {"intervention": "maps", "strength": 0},
        [{"intervention": "maps", "strength": 0}, {"intervention": "maps", "strength": 0}],
    ],
)
async def test_a_policy_needs_a_default_that_does_something(
    tiny_engine: TorchEngine,
    affine_artifact: WriteArtifact,
    registry: Registry,
    default: JsonValue,
) -> None:
    registry.add(affine_artifact("maps"))
    for policy in ("required", "locked"):
        with pytest.raises(ConfigurationError, match="its settings do nothing"):
            build_app(tiny_engine, registry, default_steering=default, steering_policy=policy)
    build_app(tiny_engine, registry, default_steering=default)


@pytest.mark.parametrize("error", [UnservableInterventionError, StepFailedError])
async def test_a_default_that_the_engine_refuses_ends_the_start(
    tiny_engine: TorchEngine,
    affine_artifact: WriteArtifact,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    error: type[UnservableInterventionError] | type[StepFailedError],
) -> None:
    registry.add(affine_artifact("maps"))
    app = build_app(tiny_engine, registry, default_steering={"intervention": "maps"})
    async with app.router.lifespan_context(app):
        pass
    monkeypatch.setattr(tiny_engine, "submit", Script([error("as the test wants")]).submit)
    with pytest.raises(ConfigurationError, match="cannot be applied: as the test wants"):
        async with app.router.lifespan_context(app):
            pass


async def test_a_default_that_the_engine_refuses_later_is_not_the_requests_fault(
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    tiny_engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.add(affine_artifact("maps"))
    client = make_client(default_steering={"intervention": "maps"})
    for stream in (False, True):
        script = Script([UnservableInterventionError("no hook") for _ in range(2)])
        monkeypatch.setattr(tiny_engine, "submit", script.submit)
        response = await complete(client, stream=stream)
        assert response.status_code == 503
        assert error_of(response)["code"] == "default_steering_unavailable"
        response = await complete(client, stream=stream, steering={"intervention": "maps"})
        assert response.status_code == 400
        assert error_of(response)["code"] == "intervention_not_servable"
