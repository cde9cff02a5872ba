"""Tests of the server's end: after a signal, at the shutdown deadline, and when the engine dies."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.types import Message

from interventions.registry import Registry
from server.config import ConfigurationError
from server.engine.torch import engine as torch_engine
from server.engine.torch.engine import TorchEngine
from server.lifecycle import Server
from server.protocol import HttpProtocol
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.live import LiveServer, live
from tests.processes import steerserve
from tests.serving import Connection, build_app, complete, error_of, eventually

ENDLESS: dict[str, object] = {"max_tokens": 500, "ignore_eos": True}


async def running(
    client: httpx.AsyncClient, engine: TorchEngine, **fields: object
) -> list[asyncio.Task[httpx.Response]]:
    """Send a plain request and a stream; return their tasks once the engine runs both."""
    tasks = [
        asyncio.create_task(complete(client, **fields, stream=stream)) for stream in (False, True)
    ]
    await eventually(lambda: engine.stats().running == 2)
    return tasks


def slowly(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each step of the engine take at least 5 ms."""
    step = engine._core.step

    def slow_step() -> object:
        time.sleep(0.005)
        return step()

    monkeypatch.setattr(engine._core, "step", slow_step)


@dataclass
class Hook:
    """Hangs an engine: once `set`, its next step with work to do sets `caught`, awaits `free`."""

    set: threading.Event = field(default_factory=threading.Event)
    caught: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def hook(tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    """Hook the tiny engine's steps; a step that is caught hangs until the end of the test."""
    hook, core, step = Hook(), tiny_engine._core, tiny_engine._core.step

    def hanging_step() -> object:
        if hook.set.is_set() and core.has_work:
            hook.caught.set()
            assert hook.free.wait(20)
        return step()

    monkeypatch.setattr(core, "step", hanging_step)
    monkeypatch.setattr(torch_engine, "LAST_STEP_SECONDS", 0.3)
    yield hook
    hook.free.set()


async def stopped(server: LiveServer) -> None:
    """Wait until the server has stopped by itself."""
    async with asyncio.timeout(20):
        await server.task


async def test_after_a_signal_running_requests_are_finished_and_no_others_taken(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(tiny_engine, monkeypatch)
    app = build_app(tiny_engine, registry)
    async with live(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        requests = await running(client, tiny_engine, max_tokens=60, ignore_eos=True)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        plain, stream = await asyncio.gather(*requests)
        assert plain.json()["usage"]["completion_tokens"] == 60
        assert stream.text.endswith("data: [DONE]\n\n")
        await stopped(server)
    assert not server.server.engine_died


@pytest.mark.parametrize(
    ("error", "told"),
    [(ConfigurationError("vLLM lost an edit"), False), (RuntimeError("a bug"), True)],
)
async def test_a_start_that_fails_is_a_sentence_unless_it_is_a_bug(
    tiny_engine: TorchEngine,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    told: bool,
) -> None:
    async def fail() -> None:
        raise error

    app = build_app(tiny_engine, registry)
    monkeypatch.setattr(TorchEngine, "ready", property(lambda _engine: False))
    monkeypatch.setattr(tiny_engine, "start", fail)
    with pytest.raises(SystemExit):
        await Server(app).serve([])
    assert str(error) in caplog.messages[-2]
    assert ("Traceback" in caplog.text) == told
    assert caplog.messages[-1] == "Application startup failed. Exiting."


@pytest.mark.parametrize("seconds", [0, 0.2])
async def test_requests_that_take_longer_are_told_that_the_server_stops(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    slowly(tiny_engine, monkeypatch)
    app = build_app(tiny_engine, registry, shutdown_timeout=seconds)
    async with live(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        requests = await running(client, tiny_engine, **ENDLESS)
        os.kill(os.getpid(), signal.SIGINT)
        plain, stream = await asyncio.gather(*requests)
        assert plain.status_code == 503
        assert error_of(plain)["code"] == "shutting_down"
        assert plain.headers["retry-after"]
        *_, last, end = stream.text.split("\n\n")
        assert '"code":"shutting_down"' in last
        assert end == ""
        await stopped(server)
    assert not tiny_engine.ready


async def test_a_server_that_stops_takes_no_new_request(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(tiny_engine, registry)
    app.state.context.lifecycle.stop()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        refused = [
            await client.get("/ready"),
            await complete(client),
            await complete(client, stream=True),
            await client.get("/v1/models"),
            await client.delete("/v1/interventions/x"),
        ]
        for answer in refused:
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "shutting_down"
            assert answer.headers["retry-after"]
        for path in ("/health", "/version", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_a_server_whose_engine_hangs_tells_everybody_and_ends_the_process(
    tiny_engine: TorchEngine,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hook: Hook,
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    app = build_app(tiny_engine, registry, shutdown_timeout=0.1)
    async with live(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        requests = await running(client, tiny_engine, **ENDLESS)
        hook.set.set()
        await eventually(hook.caught.is_set)
        # The hung engine thread takes no calls, so this request is not even queued.
        requests.append(asyncio.create_task(complete(client)))
        await eventually(lambda: len(server.server.server_state.tasks) == 3)
        os.kill(os.getpid(), signal.SIGTERM)
        for answer in await asyncio.gather(*requests):
            assert '"code":"shutting_down"' in answer.text
        await stopped(server)
    assert ends == [1]
    assert "the engine is stuck in a step" in caplog.text
    assert "Traceback" not in caplog.text
    assert not tiny_engine.ready
    assert tiny_engine._core.has_work  # the hung thread may still use its state


async def test_a_body_that_is_still_coming_is_not_waited_for(
    tiny_engine: TorchEngine, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"x" * 500
    bodies = {
        b"/v1/completions": (b"application/json", b'{"model": '),
        b"/v1/chat/completions": (b"application/json", b""),
        b"/v1/interventions": (b"multipart/form-data; boundary=b", form),
    }
    async with live(build_app(tiny_engine, registry)) as server:
        connections = []
        for path, (media_type, part) in bodies.items():
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: %b\r\nContent-Length: 9999\r\n\r\n%b" % (path, media_type, part)
            )
            connections.append((reader, writer))
        await eventually(lambda: len(server.server.server_state.tasks) == len(bodies))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(3):
            for reader, writer in connections:
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nconnection: close" in head.lower()
                assert json.loads(body)["error"]["code"] == "shutting_down"
                writer.close()
            await server.task
    assert "Traceback" not in caplog.text
    assert not list(registry.entries())


async def test_a_body_that_comes_without_a_pause_is_not_waited_for(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(tiny_engine, registry)

    class Endless(Connection):
        async def _receive(self) -> Message:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b" ", "more_body": True}

    connection = Endless({})
    request = asyncio.create_task(connection.run(app))
    await asyncio.sleep(0.05)
    app.state.context.lifecycle.stop()
    async with asyncio.timeout(3):
        await request
    assert connection.sent[0]["status"] == 503


async def test_a_second_signal_ends_the_process_at_once(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    slowly(tiny_engine, monkeypatch)
    app = build_app(tiny_engine, registry, shutdown_timeout=0.2)
    async with live(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        requests = await running(client, tiny_engine, **ENDLESS)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.02)
        assert ends == []
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: ends == [128 + signal.SIGTERM])
        await asyncio.gather(*requests)


async def test_a_server_whose_engine_dies_stops_whatever_it_was_doing(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(tiny_engine, monkeypatch)
    async with (
        live(build_app(tiny_engine, registry)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        requests = await running(client, tiny_engine, **ENDLESS)
        # A request whose body never comes would hold the server for long.
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: 9\r\n\r\n{"
        )
        await eventually(lambda: len(server.server.server_state.tasks) == 3)

        def die() -> None:
            raise SystemExit

        monkeypatch.setattr(tiny_engine._core, "step", die)
        plain, stream = await asyncio.gather(*requests)
        assert plain.status_code == 503
        assert error_of(plain)["code"] == "engine_dead"
        assert '"code":"engine_dead"' in stream.text
        await stopped(server)
        writer.close()
    assert server.server.engine_died


async def test_an_engine_that_dies_while_the_server_stops_is_told_of(
    load_tiny: LoadTiny,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The application starts and closes this engine, as under `steerserve serve`.
    engine = TorchEngine(load_tiny(), lambda digest: registry.load(digest).parameters, TINY_OPTIONS)
    slowly(engine, monkeypatch)
    async with (
        live(build_app(engine, registry)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        requests = await running(client, engine, **ENDLESS)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: not server.server.servers[0].is_serving())

        def die() -> None:
            raise SystemExit

        monkeypatch.setattr(engine._core, "step", die)
        plain, stream = await asyncio.gather(*requests)
        assert error_of(plain)["code"] == "engine_dead"
        assert '"code":"engine_dead"' in stream.text
        await stopped(server)
    assert server.server.engine_died
    assert "The engine has died while the server was stopping" in caplog.text


async def test_the_head_of_a_request_is_bounded(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        # Other parsers, which may be installed, accept heads of any size.
        assert server.server.config.http is HttpProtocol
        assert server.server.config.ws == "none"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000)
        async with asyncio.timeout(10):
            assert (await reader.read(12)) == b"HTTP/1.1 431"
        writer.close()


def test_a_terminated_process_answers_and_exits_with_0(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    model = str(tiny_folders["llama"])
    env = {"STEERSERVE_TEST_DEATH": str(tmp_path / "never")}
    arguments = ("--model", model, "--shutdown-timeout", "0.3", "--check-invariants")
    with (
        steerserve(tmp_path, *arguments, module="tests.tiny_server", env=env) as server,
        ThreadPoolExecutor() as pool,
    ):
        body = {"model": "tiny-llama", "prompt": "x", **ENDLESS}
        plain, stream = (
            pool.submit(httpx.post, f"{server.url}/v1/completions", json={**body, "stream": stream})
            for stream in (False, True)
        )
        wait_for_running(server.url, 2)
        server.process.terminate()
        assert error_of(plain.result())["code"] == "shutting_down"
        assert '"code":"shutting_down"' in stream.result().text
        assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_process_whose_engine_dies_says_so_and_exits_with_1(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    death = tmp_path / "death"
    env = {"STEERSERVE_TEST_DEATH": str(death)}
    arguments = ("--model", str(tiny_folders["llama"]))
    with steerserve(tmp_path, *arguments, module="tests.tiny_server", env=env) as server:
        threading.Timer(0.3, death.touch).start()
        body = {"model": "tiny-llama", "prompt": "x", **ENDLESS}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
        assert error_of(answer)["code"] == "engine_dead"
        assert server.process.wait(20) == 1
    assert server.log.read_text().count("The engine has died; the server stops") == 1


def test_a_process_whose_engine_hangs_answers_and_exits_with_1(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    death = tmp_path / "death"
    env = {"STEERSERVE_TEST_DEATH": str(death)}
    arguments = ("--model", str(tiny_folders["llama"]), "--shutdown-timeout", "0.3")
    with (
        steerserve(tmp_path, *arguments, module="tests.tiny_server", env=env) as server,
        ThreadPoolExecutor() as pool,
    ):
        body = {"model": "tiny-llama", "prompt": "x", **ENDLESS}
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=20)
        wait_for_running(server.url, 1)
        death.write_text("a step that never ends")
        server.process.terminate()
        assert error_of(answer.result())["code"] == "shutting_down"
        assert server.process.wait(20) == 1
    log = server.log.read_text()
    assert "The engine is stuck" in log
    assert "Traceback" not in log


def wait_for_running(url: str, count: int) -> None:
    for _ in range(200):
        if f"steerserve_requests_running {count}.0" in httpx.get(f"{url}/metrics").text:
            return
        time.sleep(0.02)
    raise TimeoutError


def test_shutdown_ends_the_wait_for_a_score(
    tiny_folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """The scorer hangs, so the shutdown must end the wait for the score of a generated text."""
    model = str(tiny_folders["llama"])
    with steerserve(tmp_path, "--model", model, "--shutdown-timeout", "0.5") as server:
        (worker,) = psutil.Process(server.process.pid).children()
        worker.suspend()
        body = {"model": "tiny-llama", "prompt": "x", "max_tokens": 3, "toxicity": True}
        with ThreadPoolExecutor() as pool:
            answers = [
                pool.submit(
                    httpx.post,
                    f"{server.url}/v1/completions",
                    json={**body, "stream": stream},
                    timeout=30,
                )
                for stream in (False, True)
            ]
            wait_for_sample(server.url, "steerserve_toxicity_queue_depth 2.0")
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            plain, stream = (answer.result() for answer in answers)
        assert server.process.wait(30) == 0
        # The killed worker, of lowest priority, ends slowly; unkilled, it would hang for a minute.
        assert time.monotonic() - began < 25
        assert (plain.status_code, error_of(plain)["code"]) == (503, "toxicity_unavailable")
        assert "toxicity_unavailable" in stream.text
        assert "Traceback" not in server.log.read_text()
        assert not worker.is_running()


def wait_for_sample(url: str, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in httpx.get(f"{url}/metrics").text.splitlines():
        assert time.monotonic() < deadline
        time.sleep(0.02)
