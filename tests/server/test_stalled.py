"""Readers that take nothing are cut off; slow ones are not."""

import asyncio
import json
import socket
import time

import pytest

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from server.stalled import StalledConnections
from tests.live import live
from tests.serving import build_app, eventually

LIMIT = 60.0


class Transport(asyncio.Transport):
    """A transport that says how much it has not sent."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


class Connection:
    def __init__(self) -> None:
        self.transport: asyncio.Transport = Transport()


def cut_at(times: dict[float, int]) -> bool:
    """Whether a connection with so much unsent at each time is cut off at the last."""
    stalled, connection = StalledConnections(LIMIT), Connection()
    assert isinstance(connection.transport, Transport)
    for now, unsent in times.items():
        assert not connection.transport.aborted
        connection.transport.unsent = unsent
        stalled.cut([connection], now)
    return connection.transport.aborted


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
    stalled = StalledConnections(LIMIT)
    connections = [Connection(), Connection()]
    slow, gone = (connection.transport for connection in connections)
    assert isinstance(slow, Transport)
    assert isinstance(gone, Transport)
    slow.unsent = gone.unsent = 5
    stalled.cut(connections, 0)
    stalled.cut(connections[:1], 30)
    slow.unsent = 4
    stalled.cut(connections, 61)
    assert not slow.aborted
    assert not gone.aborted


def connect(port: int, buffer: int) -> socket.socket:
    """A socket whose reader has so much room."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    reader.connect(("127.0.0.1", port))
    return reader


def ask(reader: socket.socket, **fields: object) -> None:
    """Send a request for many long answers."""
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
    """What waits in the process takes longer than the limit to be read; some of it always is."""
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
