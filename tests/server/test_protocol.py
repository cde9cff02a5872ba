"""Tests over raw sockets: malformed HTTP, half-closed and closed connections, and kept ones."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import pytest

from interventions.registry import Registry
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from tests.live import LiveServer, live
from tests.serving import Json, Script, ScriptedGeneration, build_app, eventually

SECONDS = 20  # a timeout; a refused client's connection is read for 2 s more


def request(
    body: Json, *headers: str, path: str = "/v1/completions", version: str = "1.1"
) -> bytes:
    """Return the bytes of a request with a JSON body."""
    content = json.dumps({"model": "tiny", "prompt": "x", **body}).encode()
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + content


@asynccontextmanager
async def connected(
    server: LiveServer,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection for a block, which must end within `SECONDS`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(SECONDS):
            yield reader, writer
    finally:
        writer.close()


async def exchange(server: LiveServer, *parts: bytes, end: bool = False) -> bytes:
    """Send the parts, and half-close if `end`; return all that the server sends until it closes."""
    async with connected(server) as (reader, writer):
        for part in parts:
            writer.write(part)
            await writer.drain()
        if end:
            writer.write_eof()
        return await reader.read()


def answers(received: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Return status, headers and body of each answer; skip interim answers (100 Continue)."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        status = int(first.split(" ")[1])
        if status == 100:
            continue
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        length = int(headers.get("content-length", len(received)))
        found.append((status, headers, received[:length]))
        received = received[length:]
    return found


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "told"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "request line"),
        (b"GET /health\r\n\r\n", 400, "request line"),
        (b"GET /health HTTP/3.0\r\n\r\n", 400, "it is HTTP/3.0"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "it is HTTP/2.0"),
        (b"GET /health HTTP/0.9\r\n\r\n", 400, "it is HTTP/0.9"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n", 400, "Host"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nno header\r\n\r\n", 400, "header"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: \x00\r\n\r\n", 400, "header"),
        (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-L: " + b"x" * 100_000,
            431,
            "head is too long",
        ),
        (b"GET /" + b"x" * 100_000, 431, "head is too long"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, "Content-Length"),
        (HEAD + b"Content-Length: 2, 3\r\n\r\n{}", 400, "Content-Length"),
        (HEAD + b"Content-Length: +2\r\n\r\n{}", 400, "Content-Length"),
        (HEAD + b"Content-Length: -2\r\n\r\n{}", 400, "Content-Length"),
        (
            HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
            400,
            "both Content-Length and Transfer-Encoding",
        ),
        (
            HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
            400,
            "both Content-Length and Transfer-Encoding",
        ),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
        (
            HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "Transfer-Encoding",
        ),
        (
            HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "Transfer-Encoding",
        ),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400, "chunk"),
    ],
)
async def test_what_is_no_http_is_refused_in_the_envelope_and_closed(
    tiny_engine: TorchEngine,
    registry: Registry,
    caplog: pytest.LogCaptureFixture,
    sent: bytes,
    status: int,
    told: str,
) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        [(found, headers, body)] = answers(await exchange(server, sent))
        state = server.server.server_state
        await eventually(lambda: not state.connections and not state.tasks)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert told in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http_request")
    assert "Traceback" not in caplog.text


async def test_a_refused_head_request_has_no_body(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    head = b"HEAD / HTTP/1.1\r\nHost: localhost\r\n"
    sent = head + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with live(build_app(tiny_engine, registry)) as server:
        received = await exchange(server, sent)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.endswith(b"\r\n\r\n")


async def test_what_follows_a_head_request_is_refused_with_a_body(
    tiny_engine: TorchEngine, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        live(build_app(tiny_engine, registry)) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"no HTTP\r\n\r\n")
        [(status, _, body)] = answers(await reader.read())
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_http_request"
    assert "Traceback" not in caplog.text


def in_chunks_of_one(content: bytes) -> bytes:
    """Return a request whose body is sent in chunks of one byte each."""
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


async def test_a_body_in_many_small_chunks_lets_others_have_their_turn(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of HTTP events that are read between two turns of the event loop is bounded."""
    read, most = 0, 0
    next_event = h11.Connection.next_event

    def counted(connection: h11.Connection) -> object:
        nonlocal read
        read += 1
        return next_event(connection)

    async def watch() -> None:
        nonlocal most
        while True:
            before = read
            await asyncio.sleep(0)
            most = max(most, read - before)

    monkeypatch.setattr(h11.Connection, "next_event", counted)
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": true}'
    sent = in_chunks_of_one(body + b" " * 50_000)
    async with live(build_app(tiny_engine, registry)) as server:
        watching = asyncio.create_task(watch())
        received = await exchange(server, sent, end=True)
        watching.cancel()
    [(status, _, answer)] = answers(received)
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 2
    assert read > 50_000
    assert most < 2_000


async def test_equal_lengths_twice_are_one(tiny_engine: TorchEngine, registry: Registry) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 1}'
    length = b"Content-Length: %d\r\n" % len(body)
    async with live(build_app(tiny_engine, registry)) as server:
        received = await exchange(server, HEAD + length * 2 + b"\r\n" + body, end=True)
    [(status, _, _)] = answers(received)
    assert status == 200


async def test_a_refused_client_that_goes_on_sending_still_reads_its_answer(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    """If the server closed the connection with bytes unread, the client would get a reset."""
    async with (
        live(build_app(tiny_engine, registry)) as server,
        connected(server) as (reader, writer),
    ):
        writer.write(b"no HTTP\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        for _ in range(50):
            writer.write(b"x" * 10_000)
            await writer.drain()
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(await reader.read())["error"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_client_that_stops_sending_gets_its_answer(
    tiny_engine: TorchEngine, registry: Registry, stream: bool
) -> None:
    body: Json = {"max_tokens": 40, "ignore_eos": True, "stream": stream}
    async with live(build_app(tiny_engine, registry)) as server:
        received = await exchange(server, request(body), end=True)
        assert (b"data: [DONE]" if stream else b'"completion_tokens":40') in received
        state = server.server.server_state
        await eventually(lambda: not state.connections and not state.tasks)


async def test_each_of_several_requests_is_answered_before_the_connection_is_closed(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    parts = [request({"max_tokens": count, "ignore_eos": True}) for count in (9, 1, 2)]
    async with live(build_app(tiny_engine, registry)) as server:
        received = await exchange(server, b"".join(parts) + HEAD[:20], end=True)
        state = server.server.server_state
        await eventually(lambda: not state.connections)
    counts = [json.loads(body)["usage"]["completion_tokens"] for _, _, body in answers(received)]
    assert counts == [9, 1, 2]


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"])
async def test_a_client_that_stops_before_its_request_is_complete_is_gone(
    tiny_engine: TorchEngine, registry: Registry, sent: bytes
) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        assert await exchange(server, sent, end=True) == b""
        state = server.server.server_state
        await eventually(lambda: not state.connections and not state.tasks)


class Dripping(ScriptedGeneration):
    """Yields a token from time to time, and never ends."""

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        while True:
            await asyncio.sleep(0.05)
            yield StepOutput((1,), "x")


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_client_that_is_gone_ends_its_generation(
    tiny_engine: TorchEngine,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    reset: bool,
    version: str,
    stream: bool,
) -> None:
    """The server notices that the client is gone even while there is nothing to send."""
    generation = ScriptedGeneration()
    monkeypatch.setattr(tiny_engine, "submit", Script([generation]).submit)
    async with live(build_app(tiny_engine, registry)) as server:
        tasks = server.server.server_state.tasks
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request({"stream": stream}, version=version))
            await eventually(lambda: len(tasks) == 1)
            await asyncio.sleep(0.1)
            assert not generation.cancelled
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await eventually(lambda: generation.cancelled)
        await eventually(lambda: not tasks and not server.server.server_state.connections)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_client_that_first_stops_sending_and_then_leaves(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    generation = Dripping()
    monkeypatch.setattr(tiny_engine, "submit", Script([generation]).submit)
    async with live(build_app(tiny_engine, registry)) as server:
        state = server.server.server_state
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request({"stream": True}))
            client.shutdown(socket.SHUT_WR)
            await eventually(lambda: len(state.tasks) == 1)
            await asyncio.sleep(0.3)
            assert not generation.cancelled
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await eventually(lambda: generation.cancelled)
        await eventually(lambda: not state.tasks and not state.connections)


async def test_a_connection_is_kept_between_requests(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    """A connection stays open for `keep_alive`, which may be longer than `body_timeout`."""
    app = build_app(tiny_engine, registry, keep_alive=2.5, body_timeout=0.3)
    async with live(app) as server, connected(server) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.8)
        assert await reader.read() == b""
