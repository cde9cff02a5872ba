"""Tests of the Host header check: a request for a foreign host is refused, and not read."""

import asyncio

import httpx
from fastapi import FastAPI
from starlette.types import Message

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient
from tests.live import live
from tests.serving import build_app, complete, error_of, metric

OWN = ("localhost", "localhost:1", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000")
FOREIGN = (
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
    *("0.0.0.0:8000", "192.168.1.2", "[fe80::1]", "localhost:8000:8000", "localhost@evil.example"),
    *("", "localhost, evil.example"),
)
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "SECRET")


async def answer(app: FastAPI, hosts: list[bytes], method: str, path: str) -> Message:
    """Return the first message of the app's answer; fail if the app reads the request's body."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the request is read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *((b"host", host) for host in hosts)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    await app(scope, receive, send)
    return sent[0]


async def test_every_path_is_closed_to_a_foreign_host(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(tiny_engine, registry)
    paths = {getattr(route, "path", "/") for route in app.routes} | {"/", "/nowhere", "/v1/"}
    assert {"/health", "/metrics", "/v1/completions", "/docs", "/openapi.json"} <= paths
    for path in paths:
        for method in METHODS:
            start = await answer(app, [b"evil.example"], method, path)
            assert start["status"] == 403, (method, path)


async def test_which_hosts_are_the_servers(
    client: httpx.AsyncClient, make_client: MakeClient
) -> None:
    for host in OWN:
        response = await client.get("/v1/models", headers={"Host": host})
        assert response.status_code == 200, host
    for host in FOREIGN:
        response = await client.get("/v1/models", headers={"Host": host})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (403, "host_not_allowed"), host
        assert "--allowed-host" in str(error["message"])
        assert response.headers["x-request-id"]
    outcome = 'requests_total{endpoint="unmatched",outcome="client_error"}'
    assert await metric(client, outcome) == len(FOREIGN)
    assert len((await client.get("/", headers={"Host": "x" * 5000})).content) < 500


async def test_an_operator_allows_a_host(make_client: MakeClient) -> None:
    client = make_client(allowed_hosts=["LLM.example.org", "2001:db8::1"])
    for host in (
        *OWN,
        "llm.example.org",
        "llm.example.org:443",
        "LLM.example.org",
        "[2001:db8::1]",
    ):
        assert (await client.get("/health", headers={"Host": host})).status_code == 200, host
        client.headers["Host"] = host
        assert (await complete(client)).status_code == 200
    for host in (*FOREIGN, "example.org", "a.llm.example.org"):
        assert (await client.get("/health", headers={"Host": host})).status_code == 403, host


async def test_a_server_for_others_checks_hosts_only_if_it_was_told_some(
    make_client: MakeClient,
) -> None:
    client = make_client(host="0.0.0.0")
    for host in (*OWN, *FOREIGN):
        assert (await client.get("/health", headers={"Host": host})).status_code == 200
    client = make_client(host="0.0.0.0", allowed_hosts=["llm.example.org"])
    for host in (*OWN, "llm.example.org"):
        assert (await client.get("/health", headers={"Host": host})).status_code == 200
    for host in FOREIGN:
        assert (await client.get("/health", headers={"Host": host})).status_code == 403


async def test_no_host_or_several(tiny_engine: TorchEngine, registry: Registry) -> None:
    app = build_app(tiny_engine, registry)
    cases: tuple[tuple[list[bytes], int], ...] = (
        ([], 200),  # HTTP/1.0 needs no Host, and no browser sends such a request
        ([b"localhost"], 200),
        ([b"localhost", b"localhost"], 403),
        ([b"localhost", b"evil.example"], 403),
        ([b"evil.example", b"localhost"], 403),
        ([b"\xff\xfe"], 403),
    )
    for hosts, status in cases:
        assert (await answer(app, hosts, "GET", "/health"))["status"] == status, hosts
    # A request without a Host header does not count as local, so it may not change the registry.
    for hosts, status in (([], 403), ([b"localhost"], 404)):
        start = await answer(app, hosts, "DELETE", "/v1/interventions/unknown")
        assert start["status"] == status


async def test_a_real_socket_without_a_host(tiny_engine: TorchEngine, registry: Registry) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        for head, status in (
            (b"GET /health HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
            (b"GET /health HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
            (b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n", b"HTTP/1.1 403"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head)
            async with asyncio.timeout(20):
                assert await reader.read(12) == status
            writer.close()
