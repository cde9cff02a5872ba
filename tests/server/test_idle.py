"""Connections that ask for nothing are closed; those that wait for an answer are not."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import pytest

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from server.idle import IdleConnections
from tests.live import live
from tests.serving import Script, ScriptedGeneration, build_app, complete, eventually, text_of

LIMIT = 30.0
KEEP_ALIVE = 65.0


class Transport(asyncio.Transport):
    """A transport that has sent everything, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.closed = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        self.closed = True


@dataclass
class Cycle:
    response_complete: bool = False


@dataclass(eq=False)
class Connection:
    transport: Transport = field(default_factory=Transport)
    cycle: Cycle | None = None
    between_requests: bool = False


def test_a_connection_without_a_request() -> None:
    idle, connection = IdleConnections(LIMIT, KEEP_ALIVE), Connection()
    for now, closed in ((0, False), (29, False), (31, True)):
        idle.close([connection], now)
        assert connection.transport.closed is closed


def test_a_connection_whose_answer_takes_long_or_is_read_slowly() -> None:
    idle, connection = IdleConnections(LIMIT, KEEP_ALIVE), Connection()
    idle.close([connection], 0)
    connection.cycle = Cycle()
    for now in (20, 600):
        idle.close([connection], now)
    connection.cycle.response_complete = True
    connection.transport.unsent = 5
    idle.close([connection], 700)
    connection.transport.unsent = 0
    for now in (800, 829):
        idle.close([connection], now)
    assert not connection.transport.closed
    idle.close([connection], 831)
    assert connection.transport.closed


def test_requests_that_come_and_go_between_two_looks() -> None:
    idle, connection = IdleConnections(LIMIT, KEEP_ALIVE), Connection()
    for now in range(0, 200, 20):
        idle.close([connection], now)
        connection.cycle = Cycle(response_complete=True)
    assert not connection.transport.closed


def test_a_connection_may_rest_longer_between_requests_than_within_one() -> None:
    idle, connection = IdleConnections(LIMIT, KEEP_ALIVE), Connection()
    connection.cycle = Cycle(response_complete=True)
    connection.between_requests = True
    for now in (0, 64):
        idle.close([connection], now)
    connection.between_requests = False  # the first byte of the next request
    for now in (65, 94):
        idle.close([connection], now)
    assert not connection.transport.closed
    idle.close([connection], 96)
    assert connection.transport.closed


def test_a_connection_that_rests_too_long() -> None:
    idle, connection = IdleConnections(LIMIT, KEEP_ALIVE), Connection()
    connection.cycle = Cycle(response_complete=True)
    connection.between_requests = True
    for now, closed in ((0, False), (64, False), (66, True)):
        idle.close([connection], now)
        assert connection.transport.closed is closed


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
async def test_half_a_request_does_not_keep_its_connection(
    tiny_engine: TorchEngine, registry: Registry, head: bytes
) -> None:
    async with live(build_app(tiny_engine, registry, body_timeout=0.3)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def drip() -> None:
            writer.write(head)
            while head:
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(10):
            # What was still on its way to a connection that is closed resets it.
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        dripping.cancel()
        writer.close()
        await eventually(lambda: not server.server.server_state.connections)


async def test_an_answer_may_take_longer(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_engine, "submit", Script([ScriptedGeneration()]).submit)
    async with (
        live(build_app(tiny_engine, registry, body_timeout=0.2)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        request = asyncio.create_task(complete(client))
        await asyncio.sleep(0.7)
        assert not request.done()
        request.cancel()
        await asyncio.wait((request,))
        monkeypatch.undo()
        assert await text_of(client)
