"""Readers that take nothing are cut off; slow ones are not."""

import asyncio
import json
import socket

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


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_a_socket_that_is_never_read_is_closed_and_all_it_held_is_freed(
    tiny_engine: TorchEngine, registry: Registry, stream: bool
) -> None:
    body = json.dumps(
        {
            "model": "tiny",
            "prompt": "x",
            "max_tokens": 400 if stream else 20,
            "ignore_eos": True,
            "logprobs": 5,
            "n": 16,
            "stream": stream,
        }
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    async with live(build_app(tiny_engine, registry, write_timeout=0.3)) as server:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            state = server.server.server_state
            await eventually(lambda: state.total_requests == (0 if stream else 1))
            await eventually(lambda: len(state.connections) == 1)
            await eventually(lambda: not state.connections)
            assert not state.tasks
            await eventually(lambda: tiny_engine.stats().kv_cache_usage == 0)
            assert tiny_engine.stats().running == 0
