"""Tests of a server behind a proxy that puts a prefix before all paths."""

import pytest

from server.config import Settings
from tests.conftest import MakeClient, WriteArtifact
from tests.serving import Json, bytes_of, error_of, metric

PROMPT: Json = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}


@pytest.mark.parametrize("prefix", ["/llm", "/a/b.c", "/llm/"])
@pytest.mark.parametrize("taken_off", [True, False])
async def test_all_paths_work_with_the_prefix_and_without(
    make_client: MakeClient, affine_artifact: WriteArtifact, prefix: str, taken_off: bool
) -> None:
    client = make_client(root_path=prefix, admin_key="admin")
    at = "" if taken_off else prefix.rstrip("/")
    for path in ("/health", "/ready", "/v1/models", "/openapi.json", "/docs", "/tokenizer_info"):
        assert (await client.get(at + path)).status_code == 200, path
    artifact = affine_artifact("maps")
    file = {"file": (artifact.name, bytes_of(artifact))}
    headers = {"Authorization": "Bearer admin"}
    response = await client.post(f"{at}/v1/interventions", files=file, headers=headers)
    assert response.status_code == 201
    shown = f"{prefix.rstrip('/')}/v1/interventions/maps"
    assert response.headers["location"] == shown
    assert (await client.get(shown)).status_code == 200
    steered = {**PROMPT, "steering": {"intervention": "maps"}}
    response = await client.post(f"{at}/v1/completions", json=steered)
    assert response.json()["steering"][0]["intervention"] == "maps"
    labels = 'requests_total{endpoint="/v1/completions",outcome="success"}'
    assert await metric(client, labels) == 1


async def test_limits_and_keys_hold_behind_a_prefix(make_client: MakeClient) -> None:
    client = make_client(root_path="/llm", api_key="k", max_body_bytes=1024)
    response = await client.post("/llm/v1/completions", json=PROMPT)
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    headers = {"Authorization": "Bearer k"}
    large = {**PROMPT, "prompt": "x" * 2000}
    response = await client.post("/llm/v1/completions", json=large, headers=headers)
    assert response.status_code == 413
    for path in ("/llmv1/models", "/other/v1/models", "/llm/llm/v1/models", "/llm"):
        assert (await client.get(path, headers=headers)).status_code == 404, path


async def test_the_documentation_has_relative_addresses(make_client: MakeClient) -> None:
    schema = (await make_client(root_path="/llm").get("/llm/openapi.json")).json()
    assert schema["servers"] == [{"url": "."}]
    assert "/v1/completions" in schema["paths"]


@pytest.mark.parametrize("taken", ["/v1", "/v1/x", "/docs", "/health"])
def test_a_prefix_is_none_of_the_servers_own_paths(taken: str) -> None:
    with pytest.raises(ValueError, match="the server's own paths begin with"):
        Settings(root_path=taken)


@pytest.mark.parametrize("wrong", ["llm", "/llm?", "/a//b", "http://a/llm", "/ü"])
def test_a_wrong_prefix_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="a root path is like /llm"):
        Settings(root_path=wrong)
