"""`steerserve bench` against a running server."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner, Result

from interventions.registry import Registry
from server.__main__ import app
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import build_app

SMALL = ("--tokens", "3", "--rounds", "2", "--batches", "1,2", "--long-prompt", "50")


async def bench(*arguments: str) -> Result:
    """The command, in a thread: the server that it talks to has this one."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["bench", *arguments])


@pytest.fixture
async def url(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[str]:
    """A server with a map and a head."""
    registry.add(affine_artifact("maps"), "maps")
    registry.add(reward_artifact("head"), "head")
    monkeypatch.setenv("COLUMNS", "200")
    async with live(build_app(tiny_engine, registry, api_key="key")) as server:
        monkeypatch.setenv("STEERSERVE_URL", server.url)
        monkeypatch.setenv("STEERSERVE_API_KEY", "key")
        yield server.url


async def test_everything_is_measured_side_by_side(url: str) -> None:
    result = await bench(*SMALL, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["url"] == url
    assert report["model"] == "tiny"
    assert [(each["batch"], each["label"]) for each in report["steering"]] == [
        (batch, label) for batch in (1, 2) for label in ("head", "maps", "maps + head")
    ]
    assert [each["label"] for each in report["distinct"]] == [
        "head: 2 values of eta",
        "maps: 2 values of strength",
        "2 interventions mixed",
    ]
    for each in (*report["steering"], *report["distinct"]):
        assert each["tokens_per_second"] > 0
        compared = each["comparison"]
        assert compared["paired"]["count"] == 2
        assert compared["paired"]["low"] <= compared["paired"]["median"]
        assert each["base_tokens_per_second"] * compared["base_seconds"]["median"] == pytest.approx(
            3 * each["batch"]
        )
    waits = report["latency"]["waits"]
    assert report["latency"]["steering"] == [{"intervention": "maps"}, {"intervention": "head"}]
    assert {(each["phase"], each["prompt"], each["steered"]) for each in waits} == {
        (phase, prompt, steered)
        for steered in (False, True)
        for phase, prompt in (
            ("decodes only", "short"),
            ("with long prompts", "short"),
            ("with long prompts", "long"),
        )
    }
    assert all(each["first_token"]["p50"] > 0 for each in waits)


@pytest.mark.usefixtures("url")
async def test_tables_show_chosen_steering_and_sections() -> None:
    steering = '{"intervention": "maps", "strength": 0.5}'
    chosen = ("--steering", steering, "--only", "steering,latency")
    result = await bench(*SMALL, *chosen)
    assert result.exit_code == 0, result.output
    assert "Steered ÷ unsteered throughput" in result.stdout
    assert "maps strength 0.5" in result.stdout
    assert "with long prompts" in result.stdout
    assert "Distinct" not in result.stdout


@pytest.mark.usefixtures("url")
async def test_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("bench", *SMALL, "--only", "distinct", "--api-key", "key", "--json")
    monkeypatch.setattr("sys.argv", ["steerserve", *words])
    result = await bench(*words[1:])
    command = json.loads(result.stdout)["command"]
    assert command.endswith("--only distinct --api-key ... --json")


@pytest.mark.usefixtures("url")
async def test_what_the_server_refuses_is_one_sentence() -> None:
    unknown = '{"intervention": "unknown"}'
    for arguments, text in (
        (("--steering", unknown), 'There is no intervention "unknown".'),
        (("--steering", '{"intervention": "maps", "strength": 7}'), "(HTTP 400)"),
        (("--steering", unknown, "--only", "latency"), 'There is no intervention "unknown".'),
        (("--model", "other"), "does not serve the model 'other'"),
        (("--api-key", "wrong"), "Incorrect key provided. (HTTP 401)"),
        (("--tokens", "5000"), "maximum context length"),
    ):
        result = await bench(*SMALL, *arguments)
        assert result.exit_code == 1, arguments
        assert result.stdout == ""
        line = result.stderr.splitlines()[-1]  # the progress bar comes before it
        assert line.startswith("Error: ")
        assert text in line


@pytest.mark.usefixtures("url")
async def test_wrong_options_are_explained() -> None:
    for arguments, text in (
        (("--steering", "{"), "is not JSON"),
        (("--steering", "1"), "is an object"),
        (("--only", "speed"), "knows steering, distinct, latency"),
        (("--batches", "1,x"), "are numbers"),
        (("--batches", "0"), "start at 1"),
    ):
        result = await bench(*arguments)
        assert result.exit_code == 2, arguments
        assert text in result.stderr


async def test_a_server_that_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "nonsense", "http://["):
        result = await bench("--url", url)
        assert result.exit_code == 1
        assert f"Error: Cannot reach {url}: " in result.stderr


async def test_a_locked_server_says_that_nothing_is_unsteered(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"), "maps")
    default = {"intervention": "maps"}
    application = build_app(
        tiny_engine, registry, default_steering=default, steering_policy="locked"
    )
    async with live(application) as server:
        result = await bench("--url", server.url)
    assert result.exit_code == 1
    assert "(HTTP 403)" in result.stderr.splitlines()[-1]


async def test_a_server_without_interventions_is_told_so(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with live(build_app(tiny_engine, registry)) as server:
        result = await bench("--url", server.url)
    assert result.exit_code == 1
    assert "lists no intervention that it can apply" in result.stderr


class OtherServer(BaseHTTPRequestHandler):
    """A server that speaks OpenAI's language and has never heard of steering."""

    def do_GET(self) -> None:
        models = [{"id": "other", "max_model_len": 512}]
        self._answer({"data": models if self.path == "/v1/models" else []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        usage = {"prompt_tokens": 40, "completion_tokens": body["max_tokens"]}
        self._answer({"choices": [{"text": "a"}], "usage": usage})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Print nothing."""

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


async def test_a_server_that_ignores_steering_is_found_out() -> None:
    steering = '{"intervention": "maps"}'
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{other.server_port}"
        result = await bench("--url", url, *SMALL, "--steering", steering)
        other.shutdown()
        thread.join()
    assert result.exit_code == 1
    assert "does not steer" in result.stderr.splitlines()[-1]
