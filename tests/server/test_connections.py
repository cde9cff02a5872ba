"""Tests that a connection is closed if it idles or its reader stalls, not if either is slow."""

import asyncio
import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import pytest

from interventions.registry import Registry
from server.connections import IdleConnections, StalledConnections
from server.engine.torch.engine import TorchEngine
from tests.live import live
from tests.serving import Script, ScriptedGeneration, build_app, complete, eventually, text_of

IDLE_LIMIT = 30.0
KEEP_ALIVE = 65.0
STALL_LIMIT = 60.0


class Transport(asyncio.Transport):
    """A transport with `unsent` bytes, which notes how it was ended."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.closed = False
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


@dataclass
class Cycle:
    """The part of uvicorn's request cycle that `IdleConnections` reads."""

    response_complete: bool = False


@dataclass(eq=False)
class Connection:
    """The part of a connection that `IdleConnections` reads."""

    transport: Transport = field(default_factory=Transport)
    cycle: Cycle | None = None
    between_requests: bool = False


def test_a_connection_without_a_request() -> None:
    idle, connection = IdleConnections(IDLE_LIMIT, KEEP_ALIVE), Connection()
    for now, closed in ((0, False), (29, False), (31, True)):
        idle.close([connection], now)
        assert connection.transport.closed is closed


def test_a_connection_whose_answer_takes_long_or_is_read_slowly() -> None:
    idle, connection = IdleConnections(IDLE_LIMIT, KEEP_ALIVE), Connection()
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
    idle, connection = IdleConnections(IDLE_LIMIT, KEEP_ALIVE), Connection()
    for now in range(0, 200, 20):
        idle.close([connection], now)
        connection.cycle = Cycle(response_complete=True)
    assert not connection.transport.closed


def test_a_connection_may_rest_longer_between_requests_than_within_one() -> None:
    idle, connection = IdleConnections(IDLE_LIMIT, KEEP_ALIVE), Connection()
    connection.cycle = Cycle(response_complete=True)
    connection.between_requests = True
    for now in (0, 64):
        idle.close([connection], now)
    connection.between_requests = False  # the first byte of the next request has come
    for now in (65, 94):
        idle.close([connection], now)
    assert not connection.transport.closed
    idle.close([connection], 96)
    assert connection.transport.closed


def test_a_connection_that_rests_too_long() -> None:
    idle, connection = IdleConnections(IDLE_LIMIT, KEEP_ALIVE), Connection()
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
            # A byte that comes after the server has closed the connection resets the connection.
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


def cut_at(times: dict[float, int]) -> bool:
    """Return whether a connection is cut off at the last of `times`.

    `times` maps a time to the number of bytes that the connection has unsent then.
    """
    stalled, transport = StalledConnections(STALL_LIMIT), Transport()
    for now, unsent in times.items():
        assert not transport.aborted
        transport.unsent = unsent
        stalled.cut([transport], now)
    return transport.aborted


@pytest.mark.parametrize(
    ("times", "cut"),
    [
        ({0: 5, 59: 5}, False),
        ({0: 5, 61: 5}, True),
        ({0: 0, 61: 0, 600: 0}, False),
        ({0: 0, 100: 5, 159: 5}, False),
        ({0: 0, 100: 5, 161: 5}, True),
        ({0: 5, 50: 4, 100: 3, 150: 2, 200: 1, 250: 0}, False),
        ({0: 5, 50: 4, 111: 4}, True),
        ({0: 5, 50: 0, 100: 5, 150: 5}, False),
    ],
)
def test_a_reader_is_cut_off_when_it_takes_nothing_for_the_whole_time(
    times: dict[float, int], cut: bool
) -> None:
    assert cut_at(times) is cut


def test_connections_are_told_apart_and_forgotten() -> None:
    stalled = StalledConnections(STALL_LIMIT)
    slow, gone = Transport(), Transport()
    slow.unsent = gone.unsent = 5
    stalled.cut([slow, gone], 0)
    stalled.cut([slow], 30)
    slow.unsent = 4
    stalled.cut([slow, gone], 61)
    assert not slow.aborted
    assert not gone.aborted


def connect(port: int, buffer: int) -> socket.socket:
    """Connect to the server with a receive buffer of `buffer` bytes."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    reader.connect(("127.0.0.1", port))
    return reader


def ask(reader: socket.socket, **fields: object) -> None:
    """Send a request for 16 completions with log-probabilities; `fields` are added to its body."""
    wanted = {"model": "tiny", "prompt": "x", "ignore_eos": True, "logprobs": 5, "n": 16, **fields}
    body = json.dumps(wanted).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_a_socket_that_is_never_read_is_closed_and_all_it_held_is_freed(
    tiny_engine: TorchEngine, registry: Registry, stream: bool
) -> None:
    async with live(build_app(tiny_engine, registry, write_timeout=0.3)) as server:
        with connect(server.port, 2048) as reader:
            ask(reader, max_tokens=400 if stream else 20, stream=stream)
            state = server.server.server_state
            await eventually(lambda: state.total_requests == (0 if stream else 1))
            await eventually(lambda: len(state.connections) == 1)
            await eventually(lambda: not state.connections)
            await eventually(lambda: not state.tasks)
            await eventually(lambda: tiny_engine.stats().kv_cache_usage == 0)
            assert tiny_engine.stats().running == 0


async def test_a_reader_that_is_slow_but_steady_gets_the_whole_stream(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    """Reading the whole answer takes longer than the write timeout, but no single pause does."""
    limit, pause = 0.4, 0.02
    answer = bytearray()
    async with live(build_app(tiny_engine, registry, write_timeout=limit)) as server:
        with connect(server.port, 8192) as reader:
            ask(reader, max_tokens=20, stream=True)
            reader.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(20):
                while not answer.endswith(b"0\r\n\r\n"):
                    part = await loop.sock_recv(reader, 2048)
                    assert part, "the stream was cut off"
                    answer += part
                    await asyncio.sleep(pause)
    assert b"data: [DONE]\n\n" in answer
    assert len(answer) / 2048 * pause > 2 * limit


async def test_a_deadline_frees_the_engine_though_the_reader_stalls(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tiny_engine._core.step

    def slow_step() -> object:
        time.sleep(0.1)  # by itself the request would end after 40 s
        return step()

    monkeypatch.setattr(tiny_engine._core, "step", slow_step)
    app = build_app(tiny_engine, registry, request_timeout=2, write_timeout=60)
    async with live(app) as server:
        with connect(server.port, 2048) as reader:
            ask(reader, max_tokens=400, stream=True)
            await eventually(lambda: tiny_engine.stats().running > 0)
            await eventually(lambda: tiny_engine.stats().kv_cache_usage == 0)
            assert server.server.server_state.connections
