"""Tests of authorization: what a request with the API key, the admin key or neither may do."""

import itertools
from pathlib import Path

import httpx
import pytest

from interventions.registry import Registry
from tests.conftest import MakeClient, WriteArtifact
from tests.serving import bytes_of, complete, error_of

OPEN = ("/health", "/ready", "/version", "/metrics")
KEYED = ("/v1/models", "/v1/models/tiny", "/v1/interventions", "/v1/interventions/maps")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def upload(
    client: httpx.AsyncClient, write: WriteArtifact, headers: dict[str, str]
) -> httpx.Response:
    files = {"file": ("x", bytes_of(write("maps")))}
    return await client.post("/v1/interventions", files=files, headers=headers)


async def test_the_api_key_guards_v1(
    make_client: MakeClient, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"))
    client = make_client(api_key="the-key")
    for path in OPEN:
        assert (await client.get(path)).status_code == 200
    wrong: tuple[dict[str, str], ...] = (
        {},
        bearer("other"),
        bearer("the-key2"),
        bearer("the-ke"),
        bearer(""),
        {"Authorization": "the-key"},
        {"Authorization": "Basic the-key"},
    )
    for headers in wrong:
        for path in KEYED:
            response = await client.get(path, headers=headers)
            assert response.status_code == 401, (headers, path)
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "the-key" not in response.text
    client.headers.update(bearer("wrong"))
    assert (await complete(client)).status_code == 401
    client.headers.update({"Authorization": "bearer the-key"})
    for path in KEYED:
        assert (await client.get(path)).status_code == 200
    assert (await complete(client)).status_code == 200


async def test_a_key_with_bytes_that_are_no_text(make_client: MakeClient) -> None:
    client = make_client(api_key="the-key")
    header = (b"Authorization", b"Bearer \xff\xfe\xe4")
    response = await client.get("/v1/models", headers=[header])
    assert response.status_code == 401


async def test_keys_are_asked_for_before_the_body_is_read(make_client: MakeClient) -> None:
    client = make_client(api_key="the-key")
    response = await client.post("/v1/completions", content=b"not json")
    assert response.status_code == 401


async def test_the_admin_key_guards_changes(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    client = make_client(api_key="api", admin_key="admin", host="0.0.0.0")
    for headers, status in (({}, 401), (bearer("other"), 401), (bearer("api"), 403)):
        response = await upload(client, affine_artifact, headers)
        assert response.status_code == status
        assert not registry.entries()
    assert (await upload(client, affine_artifact, bearer("admin"))).status_code == 201
    for headers, status in (({}, 401), (bearer("other"), 401), (bearer("api"), 403)):
        response = await client.delete("/v1/interventions/maps", headers=headers)
        assert response.status_code == status
        assert registry.entries()
    for path in KEYED:  # the admin key opens everything
        assert (await client.get(path, headers=bearer("admin"))).status_code == 200
    response = await client.delete("/v1/interventions/maps", headers=bearer("admin"))
    assert response.status_code == 200


async def test_an_admin_key_alone_leaves_reading_open(
    make_client: MakeClient, affine_artifact: WriteArtifact
) -> None:
    client = make_client(admin_key="admin")
    assert (await upload(client, affine_artifact, {})).status_code == 401
    assert (await upload(client, affine_artifact, bearer("admin"))).status_code == 201
    for path in KEYED:
        assert (await client.get(path)).status_code == 200
    assert (await complete(client)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
async def test_beyond_loopback_changes_need_an_admin_key(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry, host: str
) -> None:
    client = make_client(host=host, api_key="api")
    response = await upload(client, affine_artifact, bearer("api"))
    assert response.status_code == 403
    assert "--admin-key" in str(error_of(response)["message"])
    assert not registry.entries()
    registry.add(affine_artifact("maps"))
    response = await client.delete("/v1/interventions/maps", headers=bearer("api"))
    assert response.status_code == 403
    assert registry.entries()
    client.headers.update(bearer("api"))
    assert (await complete(client)).status_code == 200


async def test_another_sites_page_cannot_change_the_registry(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    """Any web page can have a browser send a form to 127.0.0.1; only its Origin header shows it."""
    client = make_client()
    attacks = (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:9000", "Host": "127.0.0.1:8000"},
        {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"},  # DNS rebinding
        {"Origin": "http://evil.example:8000", "Host": "127.0.0.1:8000"},
        {"Origin": "", "Host": "127.0.0.1:8000"},
    )
    for headers in attacks:
        response = await upload(client, affine_artifact, headers)
        assert response.status_code == 403, headers
        assert not registry.entries()
    own = {"Origin": "http://127.0.0.1:8000", "Host": "127.0.0.1:8000"}
    assert (await upload(client, affine_artifact, own)).status_code == 201
    for headers in attacks:
        response = await client.delete("/v1/interventions/maps", headers=headers)
        assert response.status_code == 403


FORWARDING = (
    *("Forwarded", "forwarded", "X-Forwarded-For", "x-forwarded-host", "X-Forwarded-Proto"),
    *("X-Forwarded-Prefix", "X-Forwarded-Anything", "X-Forwarded", "X_Forwarded_For", "X-Real-IP"),
    *("Via", "CF-Connecting-IP", "CF-Ray", "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP"),
    *("Fastly-Client-IP", "X-Original-Forwarded-For", "X-Envoy-External-Address", "CDN-Loop"),
)


async def test_behind_a_proxy_changes_need_an_admin_key(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    """Behind a proxy on this machine every request comes from 127.0.0.1, so that proves nothing."""
    registry.add(affine_artifact("kept"))
    client, guarded = make_client(), make_client(admin_key="admin")
    for header, value in itertools.product(FORWARDING, ("203.0.113.7", "127.0.0.1", "")):
        headers = {header: value}
        for response in (
            await upload(client, affine_artifact, headers),
            await client.delete("/v1/interventions/kept", headers=headers),
        ):
            error = error_of(response)
            assert (response.status_code, error["code"]) == (403, "admin_key_required")
            assert header.lower() in str(error["message"])
            assert "--admin-key" in str(error["message"])
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        response = await guarded.delete("/v1/interventions/kept", headers=headers)
        assert response.status_code == 401
    assert [entry.name for entry in registry.entries()] == ["kept"]
    headers = {"X-Forwarded-For": "203.0.113.7", **bearer("admin")}
    assert (await upload(guarded, affine_artifact, headers)).status_code == 201


async def test_whoever_comes_by_an_allowed_host_is_not_local(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    """A request for a public host may come through a proxy that adds no header of its own."""
    client = make_client(allowed_hosts=["llm.example.org"])
    for origin in ({}, {"Origin": "https://llm.example.org"}):
        headers = {"Host": "llm.example.org", **origin}
        response = await upload(client, affine_artifact, headers)
        assert response.status_code == 403
        assert error_of(response)["code"] == "admin_key_required"
        assert not registry.entries()
    assert (await upload(client, affine_artifact, {})).status_code == 201


async def test_with_an_api_key_alone_nobody_changes_the_registry(
    make_client: MakeClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    registry.add(affine_artifact("kept"))
    client = make_client(api_key="the-key")
    for headers, status in (({}, 401), (bearer("wrong"), 401), (bearer("the-key"), 403)):
        for response in (
            await upload(client, affine_artifact, headers),
            await client.delete("/v1/interventions/kept", headers=headers),
        ):
            assert response.status_code == status
            if status == 403:
                error = error_of(response)
                assert error["code"] == "admin_key_required"
                assert "--admin-key" in str(error["message"])
    assert [entry.name for entry in registry.entries()] == ["kept"]


async def test_a_key_from_a_file_guards_as_one_that_is_given(
    make_client: MakeClient, affine_artifact: WriteArtifact, tmp_path: Path
) -> None:
    (tmp_path / "api").write_text("the-key\n")
    (tmp_path / "admin").write_text("the-admin-key\n")
    client = make_client(api_key_file=str(tmp_path / "api"), admin_key_file=str(tmp_path / "admin"))
    assert (await client.get("/v1/models")).status_code == 401
    assert (await client.get("/v1/models", headers=bearer("the-key"))).status_code == 200
    assert (await upload(client, affine_artifact, bearer("the-key"))).status_code == 403
    assert (await upload(client, affine_artifact, bearer("the-admin-key"))).status_code == 201


async def test_keys_reach_no_log(
    make_client: MakeClient, affine_artifact: WriteArtifact, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    client = make_client(api_key="the-api-key", admin_key="the-admin-key")
    await upload(client, affine_artifact, bearer("the-admin-key"))
    await client.get("/v1/models", headers=bearer("the-api-key"))
    await client.get("/v1/models", headers=bearer("the-wrong-key"))
    assert "-key" not in caplog.text
