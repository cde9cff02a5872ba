"""Tests that deadlines, leaving clients and failing steps free all that a request held."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient, WriteArtifact
from tests.engines import idle
from tests.serving import (
    Connection,
    Json,
    build_app,
    complete,
    error_of,
    events,
    eventually,
    metric,
    push,
    text_of,
)

ENDLESS: Json = {"max_tokens": 500, "ignore_eos": True}


class Gate:
    """Lets an engine compute only the steps that `let` permits, until `open` permits all."""

    def __init__(self, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._core = engine._core
        self._step: Callable[[], object] = engine._core.step
        self._permits = threading.Semaphore(0)
        self.used = 0  # permits
        self._open = threading.Event()
        monkeypatch.setattr(engine._core, "step", self._gated_step)

    def let(self, steps: int) -> None:
        """Permit this many more steps."""
        self._permits.release(steps)

    def open(self) -> None:
        """Permit all steps from now on."""
        self._open.set()
        self.let(1)

    def _gated_step(self) -> object:
        if self._core.has_work and not self._open.is_set():
            assert self._permits.acquire(timeout=20)
            self.used += 1
        return self._step()


@pytest.fixture
def gate(tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Put a gate, closed at first, before the tiny engine's steps."""
    gate = Gate(tiny_engine, monkeypatch)
    yield gate
    gate.open()


async def begin(engine: TorchEngine, gate: Gate, state: str) -> None:
    """Bring the request that was just sent into `state`, "waiting" or "running"."""
    await eventually(lambda: engine.stats().waiting == 1)
    if state == "running":
        gate.let(3)
        # Permits that are left would let the engine go on, whatever the test does next.
        await eventually(lambda: gate.used == 3 and engine.stats().running == 1)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_a_client_that_leaves_is_gone_after_two_steps(
    tiny_engine: TorchEngine, registry: Registry, gate: Gate, stream: bool, state: str
) -> None:
    connection = Connection({"model": "tiny", "prompt": "x", "stream": stream, **ENDLESS})
    request = asyncio.create_task(connection.run(build_app(tiny_engine, registry)))
    await begin(tiny_engine, gate, state)
    connection.leave.set()
    async with asyncio.timeout(10):
        await request  # the application finishes before the engine takes another step
    assert not idle(tiny_engine)
    gate.let(2)
    await eventually(lambda: idle(tiny_engine))


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("state", ["waiting", "running"])
async def test_a_request_ends_at_its_deadline(
    tiny_engine: TorchEngine,
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    gate: Gate,
    stream: bool,
    state: str,
) -> None:
    client = make_client(request_timeout=1)
    await push(client, affine_artifact("maps"))
    fields = {**ENDLESS, "stream": stream, "steering": {"intervention": "maps"}}
    request = asyncio.create_task(complete(client, **fields))
    await begin(tiny_engine, gate, state)
    assert_timed_out(await request, stream)
    gate.let(2)
    await eventually(lambda: idle(tiny_engine))
    assert await metric(client, 'requests_total{endpoint="/v1/completions",outcome="server_error"}')


async def test_a_request_ends_at_its_deadline_while_its_intervention_is_read(
    tiny_engine: TorchEngine,
    make_client: MakeClient,
    affine_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = make_client(request_timeout=0.1)
    await push(client, affine_artifact("maps"))
    disk = threading.Event()
    read = tiny_engine._reads._source

    def read_slowly(digest: str) -> object:
        assert disk.wait(20)
        return read(digest)

    monkeypatch.setattr(tiny_engine._reads, "_source", read_slowly)
    response = await complete(client, **ENDLESS, steering={"intervention": "maps"})
    assert_timed_out(response, stream=False)
    disk.set()
    await eventually(lambda: idle(tiny_engine))
    assert tiny_engine.stats().slots_used == 0, "loaded for nobody"
    assert await text_of(make_client(), steering={"intervention": "maps"})


async def test_an_answer_that_is_complete_in_time_is_given(make_client: MakeClient) -> None:
    assert await text_of(make_client(request_timeout=20))


async def test_a_failing_step_is_told_to_each_of_its_requests(
    tiny_engine: TorchEngine,
    client: httpx.AsyncClient,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError("a secret of the inside")

    requests: list[Awaitable[httpx.Response]] = [
        asyncio.create_task(complete(client, stream=stream, n=2)) for stream in (False, True)
    ]
    await eventually(lambda: tiny_engine.stats().waiting == 4)
    with monkeypatch.context() as broken:
        broken.setattr(tiny_engine._core._runner, "run", fail)
        gate.let(1)
        plain, stream = await asyncio.gather(*requests)
    assert plain.status_code == 500
    assert error_of(plain)["code"] == "step_failed"
    [only] = events(stream.text)
    assert json.loads(only)["error"]["code"] == "step_failed"
    assert "secret" not in plain.text + stream.text
    gate.open()
    assert await text_of(client)
    assert idle(tiny_engine)


def assert_timed_out(response: httpx.Response, stream: bool) -> None:
    """Assert that the answer, or the last event of a stream, is the error of a passed deadline."""
    if stream:
        assert response.status_code == 200
        error = json.loads(events(response.text)[-1])["error"]
    else:
        assert response.status_code == 504
        error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "request_timeout")
