"""Tests of CORS: what pages of other origins may do; none counts as the machine's own user."""

import httpx
import pytest
from pydantic import JsonValue

from interventions.registry import Registry
from server.engine.errors import QueueFullError
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient, WriteArtifact
from tests.serving import Script, bytes_of, complete, error_of

PAGE = "https://chat.example.org"
OTHER = "http://localhost:3000"
ALLOW = "access-control-allow-origin"


async def preflight(
    client: httpx.AsyncClient, origin: str, method: str = "POST", **headers: str
) -> httpx.Response:
    """Send the preflight that a browser sends before a page's request."""
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        **headers,
    }
    return await client.options("/v1/chat/completions", headers=asked)


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    for response in (
        await preflight(client, PAGE),
        await complete(client),
        await client.get("/v1/models", headers={"Origin": PAGE}),
        await client.get("/v1/models", headers={"Origin": "null"}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]
    assert (await preflight(client, PAGE)).status_code == 405


async def test_an_allowed_origin_may_generate(make_client: MakeClient) -> None:
    client = make_client(cors_origins=[PAGE, OTHER])
    for origin in (PAGE, OTHER):
        answer = await preflight(client, origin)
        assert answer.status_code == 200
        assert answer.headers[ALLOW] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"]
        assert {"authorization", "content-type", "x-stainless-lang"} <= set(allowed.split(","))
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-request-id"]
        client.headers["Origin"] = origin
        for stream in (False, True):
            answer = await complete(client, stream=stream)
            assert answer.status_code == 200
            assert answer.headers[ALLOW] == origin
            assert "origin" in answer.headers["vary"].lower()
            exposed = answer.headers["access-control-expose-headers"].lower()
            assert {"x-request-id", "retry-after"} <= set(exposed.split(", "))


async def test_another_origin_is_told_nothing(make_client: MakeClient) -> None:
    client = make_client(cors_origins=[PAGE, OTHER])
    for origin in (
        *("https://evil.example", "null", "", f"{PAGE}:1", f"{PAGE}.evil.example", f"{PAGE}/"),
        *("http://chat.example.org", "https://a.chat.example.org", "http://localhost"),
    ):
        refused = await preflight(client, origin)
        assert refused.status_code == 400, origin
        assert error_of(refused)["code"] == "origin_not_allowed"
        for response in (refused, await client.get("/v1/models", headers={"Origin": origin})):
            assert ALLOW not in response.headers
            assert "origin" in response.headers["vary"].lower()


async def test_a_method_that_no_route_has_is_refused(make_client: MakeClient) -> None:
    client = make_client(cors_origins=[PAGE])
    for method in ("DELETE", "GET", "HEAD"):
        assert (await preflight(client, PAGE, method)).status_code == 200
    refused = await preflight(client, PAGE, "PATCH")
    assert refused.status_code == 400
    assert error_of(refused)["code"] == "origin_not_allowed"


async def test_a_page_may_ask_to_reach_a_private_address(make_client: MakeClient) -> None:
    client = make_client(cors_origins=[PAGE])
    asked = {"Access-Control-Request-Private-Network": "true"}
    answer = await preflight(client, PAGE, **asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert (await preflight(client, "https://evil.example", **asked)).status_code == 400


async def test_every_error_can_be_read_by_the_page(
    make_client: MakeClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> list[int]:
        raise RuntimeError("as the test wants")

    client = make_client(cors_origins=[PAGE], api_key="k")
    client.headers["Origin"] = PAGE
    unauthorized = await complete(client)
    client.headers["Authorization"] = "Bearer k"
    monkeypatch.setattr(tiny_engine, "submit", Script([QueueFullError("full")]).submit)
    answers = {
        401: unauthorized,
        400: await complete(client, temperature=9),
        404: await client.get("/nowhere"),
        405: await client.put("/v1/models"),
        413: await client.post("/v1/completions", content=bytes(5_000_000)),
        415: await client.post("/v1/completions", content=b"x"),
        429: await complete(client),
        403: await client.get("/v1/models", headers={"Host": "evil.example"}),
    }
    monkeypatch.setattr(tiny_engine.prompts, "tokenize", fail)
    answers[500] = await complete(client)
    for status, answer in answers.items():
        assert answer.status_code == status
        assert error_of(answer)
        assert answer.headers[ALLOW] == PAGE, status
        assert len(answer.headers.get_list("x-request-id")) == 1


async def test_every_origin_may_be_allowed_behind_a_key(make_client: MakeClient) -> None:
    client = make_client(cors_origins=["*"], api_key="k")
    for origin in (PAGE, "https://any.example", "null"):
        answer = await preflight(client, origin)
        assert (answer.status_code, answer.headers[ALLOW]) == (200, "*")
        client.headers["Origin"] = origin
        assert (await complete(client)).status_code == 401
        answer = await client.get("/v1/models", headers={"Authorization": "Bearer k"})
        assert (answer.status_code, answer.headers[ALLOW]) == (200, "*")


@pytest.mark.parametrize("origins", [[], [PAGE, OTHER]])
async def test_a_page_changes_the_registry_with_the_admin_key_only(
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    registry: Registry,
    origins: list[JsonValue],
) -> None:
    registry.add(affine_artifact("kept"))
    content = bytes_of(affine_artifact("maps"))
    for origin in (PAGE, OTHER):
        client = make_client(cors_origins=origins)
        client.headers["Origin"] = origin
        for response in (
            await client.post("/v1/interventions", files={"file": ("x", content)}),
            await client.delete("/v1/interventions/kept"),
        ):
            assert response.status_code == 403
            assert error_of(response)["code"] == "admin_key_required"
        assert [entry.name for entry in registry.entries()] == ["kept"]
        client = make_client(cors_origins=origins, admin_key="a")
        client.headers.update({"Origin": origin, "Authorization": "Bearer a"})
        pushed = await client.post("/v1/interventions", files={"file": ("x", content)})
        assert pushed.status_code == 201
        assert (await client.delete("/v1/interventions/maps")).status_code == 200


async def test_a_preflight_for_a_foreign_host_is_refused(make_client: MakeClient) -> None:
    client = make_client(cors_origins=[PAGE])
    refused = await preflight(client, PAGE, Host="evil.example")
    assert refused.status_code == 403
    assert error_of(refused)["code"] == "host_not_allowed"
