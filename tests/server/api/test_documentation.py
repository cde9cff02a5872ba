"""Tests of the API's documentation: OpenAPI schema, offline /docs page, and the keys for both."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import jsonschema
import pytest
from pydantic import BaseModel

from server.api.chat_schemas import ChatRequest
from server.api.messages import ROLES
from server.api.request_shapes import MessageShape
from server.api.response_schemas import ResponseRequest
from server.api.schemas import CompletionRequest
from tests.conftest import MakeClient
from tests.serving import SAMPLING_FIELDS, Json, error_of

ROOT = Path(__file__).parents[3]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "docs/serving.md"))
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
}
KEY = {"Authorization": "Bearer the-key"}


async def schema_of(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/openapi.json")
    assert response.status_code == 200
    schema: dict[str, Any] = response.json()
    return schema


def check(schema: dict[str, Any], path: str, body: object) -> None:
    """Validate a body against the schema of a route's request body."""
    content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    whole = {**content["schema"], "components": schema["components"]}
    jsonschema.Draft202012Validator(whole).validate(body)


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


async def test_the_schema_has_every_route_and_all_that_it_refers_to(
    client: httpx.AsyncClient,
) -> None:
    schema = await schema_of(client)
    assert schema["info"]["title"] == "steerserve"
    assert {"/v1/completions", "/v1/interventions/{reference}", "/metrics"} <= set(schema["paths"])
    found = set(references(schema))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in schema["components"]["schemas"]
    assert "$defs" not in json.dumps(schema)
    for operations in schema["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            told = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert told == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert (await schema_of(client)) == schema


@pytest.mark.parametrize(("path", "model"), BODIES.items())
async def test_the_schema_has_each_field_of_a_body(
    client: httpx.AsyncClient, path: str, model: type[BaseModel]
) -> None:
    schema = await schema_of(client)
    content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    assert set(content["schema"]["properties"]) == fields.keys()
    needed = {name for name, field in fields.items() if field.is_required()}
    assert set(content["schema"]["required"]) == needed
    assert not content["schema"]["additionalProperties"]
    assert len(content["examples"]) == 5
    for example in content["examples"].values():
        check(schema, path, example["value"])
        model.model_validate(example["value"])


async def test_what_is_accepted_agrees_with_the_schema(client: httpx.AsyncClient) -> None:
    schema = await schema_of(client)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    good: list[tuple[str, Json]] = [
        ("/v1/completions", {"prompt": "x", **SAMPLING_FIELDS}),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "steering": [], "stop": "a"}),
        ("/v1/chat/completions", {"messages": messages, **SAMPLING_FIELDS}),
    ]
    for path, fields in good:
        body = {"model": "tiny", **fields}
        check(schema, path, body)
        BODIES[path].model_validate(body)
    for text in re.findall(r"-d '(\{.*?\})'", PAGES, re.DOTALL):
        body = json.loads(text)
        paths = {"messages": "/v1/chat/completions", "input": "/v1/responses"}
        named = [path for field, path in paths.items() if field in body]
        check(schema, named[0] if named else "/v1/completions", body)
    bad: list[Json] = [
        {"prompt": {}},
        {"prompt": "x", "temperature": 3},
        {"prompt": "x", "unknown": 1},
        {"prompt": "x", "steering": {"strength": 1}},
        {"prompt": "x", "steering": {"intervention": "x", "strenght": 1}},
        {"prompt": "x", "logit_bias": []},
    ]
    for fields in bad:
        with pytest.raises(jsonschema.ValidationError):
            check(schema, "/v1/completions", {"model": "tiny", **fields})


def test_the_roles_of_the_schema_are_those_that_are_read() -> None:
    assert set(get_args(get_type_hints(MessageShape)["role"])) == set(ROLES)


async def test_the_page_and_its_files_come_from_the_server(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    assert "openapi.json" in page.text
    assert "//" not in re.sub(
        r"<!--.*?-->|^\s*//.*$", "", page.text, flags=re.DOTALL | re.MULTILINE
    )
    named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert len(named) == 3
    for name in named:
        response = await client.get(f"/{name}")
        assert response.status_code == 200
        assert len(response.content) > 1000
        assert not response.headers["content-type"].startswith("application/json")
    for missing in ("/docs/other.js", "/docs/..%2fcore.py", "/redoc", "/docs/oauth2-redirect"):
        response = await client.get(missing)
        assert response.status_code == 404
        assert error_of(response)["message"]


async def test_with_an_api_key_the_schema_needs_it_and_the_page_is_off(
    make_client: MakeClient,
) -> None:
    client = make_client(api_key="the-key", admin_key="admin")
    assert error_of(await client.get("/openapi.json"))["code"] == "invalid_api_key"
    for key in ("the-key", "admin"):
        headers = {"Authorization": f"Bearer {key}"}
        assert (await client.get("/openapi.json", headers=headers)).status_code == 200
    for path in ("/docs", "/docs/swagger-ui.css"):
        for headers in ({}, KEY):
            response = await client.get(path, headers=headers)
            assert response.status_code == 404
            assert error_of(response)["code"] == "documentation_off"


async def test_metrics_may_have_a_key_of_their_own(make_client: MakeClient) -> None:
    client = make_client(metrics_key="the-key", api_key="api", admin_key="admin")
    for headers in ({}, {"Authorization": "Bearer api"}, {"Authorization": "Basic the-key"}):
        response = await client.get("/metrics", headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "steerserve_" not in response.text
    for key in ("the-key", "admin"):
        response = await client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200
        assert "steerserve_engine_up" in response.text
    response = await client.get("/v1/models", headers=KEY)
    assert response.status_code == 401  # the metrics key opens nothing else
    for path in ("/health", "/ready", "/version"):
        assert (await client.get(path)).status_code == 200


async def test_metrics_without_a_key_of_their_own_are_open(make_client: MakeClient) -> None:
    assert (await make_client(api_key="api").get("/metrics")).status_code == 200
