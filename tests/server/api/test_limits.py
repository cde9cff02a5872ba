"""Tests of how long a request's body may take to arrive."""

import asyncio
import json
import math
import time
from pathlib import Path

import pytest

from interventions.registry import Registry
from server.api.limits import UPLOAD_PATH, _BodyLimits
from server.engine.torch.engine import TorchEngine
from tests.live import LiveServer, live
from tests.serving import build_app, eventually

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data; boundary=b"


async def trickle(server: LiveServer, path: str, media_type: str, begin: bytes) -> bytes:
    """Send `begin`, then a byte every 30 ms until the server answers; return the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\n"
        "Content-Length: 4000\r\n\r\n".encode()
        + begin
    )
    answering = asyncio.create_task(reader.read())
    try:
        async with asyncio.timeout(20):
            while not answering.done():
                writer.write(b" ")
                await asyncio.sleep(0.03)
            return await answering
    finally:
        writer.close()


def assert_too_slow(answer: bytes) -> None:
    """Assert that the answer is a 408 in the server's error envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "body_timeout"


async def test_a_body_that_trickles_in_must_be_here_within_the_requests_time(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with live(build_app(tiny_engine, registry, request_timeout=0.5)) as server:
        began = time.monotonic()
        assert_too_slow(await trickle(server, "/v1/completions", JSON_TYPE, b'{"model":'))
        assert time.monotonic() - began >= 0.5
        await eventually(lambda: not server.server.server_state.tasks)


async def test_an_upload_that_trickles_in_is_given_up_and_leaves_nothing(
    tiny_engine: TorchEngine, registry: Registry, tmp_path: Path
) -> None:
    app = build_app(tiny_engine, registry, body_timeout=0.5, min_upload_rate=10_000)
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    async with live(app) as server:
        assert_too_slow(await trickle(server, UPLOAD_PATH, FORM_TYPE, part))
    assert not any((tmp_path / "registry" / "tmp").iterdir())


@pytest.mark.parametrize(
    ("seconds", "received", "left"),
    [
        (0, 0, 30),
        (29, 0, 1),
        (30, 0, 0),
        (31, 0, -1),
        (31, 10_000, 9),
        (100, 100_000, 30),
        (1000, 1_000_000, 30),
        (1031, 1_000_000, -1),
    ],
)
def test_an_upload_may_take_as_long_as_it_keeps_its_pace(
    monkeypatch: pytest.MonkeyPatch, seconds: float, received: int, left: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5 + seconds)
    allowance = _BodyLimits(size=10**9, pause=30, seconds=30, rate=1000)
    assert allowance.time_left(5, received) == left


@pytest.mark.parametrize(("seconds", "left"), [(0, 30), (580, 20), (601, -1)])
def test_another_body_has_its_time_whatever_its_pace(
    monkeypatch: pytest.MonkeyPatch, seconds: float, left: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    allowance = _BodyLimits(size=10**9, pause=30, seconds=600, rate=math.inf)
    assert allowance.time_left(0, 10**8) == left


async def test_a_client_that_asks_before_it_sends_too_much_is_not_told_to_send(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99000000\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
