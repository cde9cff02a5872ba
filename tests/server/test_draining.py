"""Tests of a shutdown: open connections may bring one more request, and no new ones are taken."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from pydantic import ValidationError

from interventions.registry import Registry
from server.config import Settings
from server.engine.torch.engine import TorchEngine
from tests.live import LiveServer, live
from tests.serving import build_app, complete, error_of, eventually

LONG = {"max_tokens": 40, "ignore_eos": True}


def slowly(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each step of the engine take at least 10 ms."""
    step = engine._core.step

    def slow_step() -> object:
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(engine._core, "step", slow_step)


@asynccontextmanager
async def leaving(
    engine: TorchEngine, registry: Registry, keep_alive: float
) -> AsyncIterator[tuple[LiveServer, httpx.AsyncClient]]:
    """Start a server, open one connection to it, then send SIGTERM; yield server and client."""
    app = build_app(engine, registry, shutdown_keep_alive=keep_alive)
    async with (
        live(app) as server,
        httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client,
    ):
        await client.get("/health")
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: not server.server.servers[0].is_serving())
        yield server, client


async def ended(server: LiveServer) -> None:
    async with asyncio.timeout(10):
        await server.task


async def test_an_open_connection_brings_one_more_request(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with leaving(tiny_engine, registry, keep_alive=10) as (server, client):
        answer = await complete(client)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        with pytest.raises(httpx.ConnectError):  # which tells the client that nothing was begun
            await client.get("/health")
        await ended(server)  # at once, as no connection is left


async def test_idle_connection_closes_at_once_without_shutdown_keep_alive(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with leaving(tiny_engine, registry, keep_alive=0) as (server, client):
        with pytest.raises(httpx.TransportError):
            await client.get("/health")
        await ended(server)


async def test_a_connection_that_brings_none_is_closed_after_its_time(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    began = time.monotonic()
    async with leaving(tiny_engine, registry, keep_alive=0.5) as (server, _):
        await asyncio.sleep(0.2)
        assert not server.task.done()
        await ended(server)
        assert 0.4 < time.monotonic() - began < 8


async def test_a_connection_may_rest_after_an_answer_that_had_begun_before(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's head had no `Connection: close`, so the client may send another request."""
    slowly(tiny_engine, monkeypatch)
    app = build_app(tiny_engine, registry, shutdown_keep_alive=5)
    async with (
        live(app) as server,
        httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client,
    ):
        body = {"model": "tiny", "prompt": "x", "stream": True, **LONG}
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            os.kill(os.getpid(), signal.SIGTERM)
            await eventually(lambda: not server.server.servers[0].is_serving())
            assert "connection" not in stream.headers
            assert (await stream.aread()).endswith(b"data: [DONE]\n\n")
        assert len(server.server.server_state.connections) == 1
        answer = await complete(client)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        await ended(server)


async def test_a_body_that_was_still_coming_is_taken(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 2}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(body)
    app = build_app(tiny_engine, registry, shutdown_keep_alive=5)
    async with live(app) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + b"Content-Type: application/json\r\n\r\n" + body[:9])
        await eventually(lambda: len(server.server.server_state.tasks) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: not server.server.servers[0].is_serving())
        writer.write(body[9:])
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await ended(server)


async def test_a_request_on_an_open_connection_must_end_in_the_time_for_all(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(tiny_engine, monkeypatch)
    app = build_app(tiny_engine, registry, shutdown_keep_alive=0.5, shutdown_timeout=1)
    async with (
        live(app) as server,
        httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client,
    ):
        await client.get("/health")
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: not server.server.servers[0].is_serving())
        answer = await complete(client, max_tokens=500, ignore_eos=True)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
        await ended(server)
        assert 0.9 < time.monotonic() - began < 8


async def test_a_connection_that_waits_to_be_accepted_is_answered(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operating system has completed the connection, so its request may have been sent."""
    app = build_app(tiny_engine, registry, shutdown_keep_alive=5)
    with socket.socket() as waiting:
        async with live(app) as server:

            async def connect_and_stop(_: int) -> bool:
                # The event loop accepts nothing between this and the end of listening.
                waiting.connect(("127.0.0.1", server.port))
                waiting.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return True

            monkeypatch.setattr(server.server, "on_tick", connect_and_stop)
            await ended(server)
        waiting.settimeout(10)
        head = waiting.recv(4096)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in head.lower()


async def test_a_waiting_connection_whose_client_has_left_harms_nobody(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live(build_app(tiny_engine, registry, shutdown_keep_alive=0.2)) as server:

        async def connect_leave_and_stop(_: int) -> bool:
            with socket.socket() as waiting:
                waiting.connect(("127.0.0.1", server.port))
                waiting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return True

        monkeypatch.setattr(server.server, "on_tick", connect_leave_and_stop)
        await ended(server)


def test_an_idle_connection_may_not_stay_longer_than_requests_may_go_on() -> None:
    with pytest.raises(ValidationError, match="shutdown_keep_alive"):
        Settings(shutdown_keep_alive=30, shutdown_timeout=30)
    assert Settings(shutdown_keep_alive=0, shutdown_timeout=0).shutdown_keep_alive == 0
