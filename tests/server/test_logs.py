"""Tests of log lines: their fields, that they hide clients' texts, and that none can be forged."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import httpx
import pytest

from interventions.registry import Registry
from server.app import create_app
from server.config import Settings
from server.engine.torch.engine import TorchEngine
from server.logs import LogFormat, LogSink, configure_logging
from server.metrics import Metrics
from server.records import GenerationRecord, InterventionRecord, MessageRecord, RequestRecord
from tests.conftest import WriteArtifact
from tests.serving import Json, chat, complete, user

DIGEST = "0123456789abcdef" * 4
SECRET = "rosebud"
FORGED = f"{SECRET}\n2026-01-01T00:00:00.000Z INFO steerserve.requests: forged\r\x1b[2K\u2028x"


@contextmanager
def logging_as(style: LogFormat) -> Iterator[io.StringIO]:
    """Configure logging as a server does and yield what it writes; restore logging afterwards."""
    root = logging.getLogger()
    names = ("interventions", "server", "steering", "steerserve", "uvicorn")
    levels = {name: logging.getLogger(name).level for name in names}
    level, stream = root.level, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "handlers", [])
        patch.setattr(sys, "stderr", stream)
        configure_logging(style)
        try:
            yield stream
        finally:
            logging.captureWarnings(False)
            root.setLevel(level)
            for name, before in levels.items():
                logging.getLogger(name).setLevel(before)


def generation() -> GenerationRecord:
    """Return the record of a generation with every field filled in."""
    return GenerationRecord(
        operation="chat",
        response_id="chatcmpl-1",
        model="tiny+detox",
        served_model="tiny",
        choices=2,
        interventions=[
            InterventionRecord("detox", DIGEST, "affine"),
            InterventionRecord("calm", "f" * 64, "reward"),
        ],
        prompt_tokens=5,
        completion_tokens=12,
        finish_reasons=["stop", None],
        queue_seconds=0.00000123,
        first_token_seconds=0.25,
        prompts=[MessageRecord("system", SECRET), MessageRecord("user", FORGED)],
        completions=[FORGED, ""],
    )


def record(**fields: object) -> RequestRecord:
    """Return the record of a request that came in the year 2001, with these fields changed."""
    made = RequestRecord("abc123", "POST", 1_000_000_000 * 10**9)
    made.endpoint, made.status, made.outcome = "/v1/chat/completions", 200, "success"
    made.seconds = 1.5
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_request_is_one_json_object() -> None:
    with logging_as("json") as stream:
        LogSink(with_content=False).record(record(generation=generation()))
    [line] = stream.getvalue().splitlines()
    said = json.loads(line)
    moment = datetime.fromisoformat(said.pop("time"))
    assert moment.utcoffset() == datetime.now(UTC).utcoffset()
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
    assert said == {
        "level": "INFO",
        "logger": "steerserve.requests",
        "message": "POST /v1/chat/completions 200 success",
        "request_id": "abc123",
        "method": "POST",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "outcome": "success",
        "error_code": None,
        "seconds": 1.5,
        "operation": "chat",
        "response_id": "chatcmpl-1",
        "model": "tiny+detox",
        "stream": False,
        "interventions": [
            {"name": "detox", "digest": DIGEST, "kind": "affine"},
            {"name": "calm", "digest": "f" * 64, "kind": "reward"},
        ],
        "choices": 2,
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "finish_reasons": ["stop", None],
        "queue_seconds": 0.000001,
        "first_token_seconds": 0.25,
    }


def test_a_request_is_one_short_line_of_text() -> None:
    with logging_as("text") as stream:
        LogSink(with_content=False).record(record(generation=generation()))
        LogSink(with_content=False).record(record(status=429, outcome="rejected"))
    first, second = stream.getvalue().splitlines()
    time, _, rest = first.partition(" ")
    assert time.endswith("Z")
    assert datetime.fromisoformat(time)
    assert rest == (
        "INFO steerserve.requests: POST /v1/chat/completions 200 success seconds=1.5 "
        "request_id=abc123 model=tiny+detox interventions=detox@0123456789ab,calm@ffffffffffff "
        "tokens=5+12 finished=stop queue_seconds=1e-06 first_token_seconds=0.25"
    )
    assert second.endswith("POST /v1/chat/completions 429 rejected seconds=1.5 request_id=abc123")


def test_content_is_logged_only_where_it_is_asked_for() -> None:
    styles: tuple[LogFormat, ...] = ("json", "text")
    for style in styles:
        with logging_as(style) as stream:
            LogSink(with_content=False).record(record(generation=generation()))
        assert "rosebud" not in stream.getvalue()
    with logging_as("json") as stream:
        LogSink(with_content=True).record(record(generation=generation()))
    [line] = stream.getvalue().splitlines()
    said = json.loads(line)
    assert said["prompts"] == [
        {"role": "system", "text": SECRET},
        {"role": "user", "text": FORGED},
    ]
    assert said["completions"] == [FORGED, ""]
    with logging_as("text") as stream:
        LogSink(with_content=True).record(record(generation=generation()))
    [line] = stream.getvalue().splitlines()
    assert line.count(json.dumps(FORGED)) == 2


@pytest.mark.parametrize("style", ["json", "text"])
def test_nobody_can_forge_a_line(style: LogFormat) -> None:
    made = generation()
    made.model = FORGED
    with logging_as(style) as stream:
        LogSink(with_content=True).record(record(generation=made, error_code=FORGED))
        logging.getLogger("server.x").warning("said %s", FORGED)
        try:
            raise ValueError(FORGED)
        except ValueError:
            logging.getLogger("server.x").exception("failed\n")
    # Check the output as a terminal or a log collector reads it.
    written = stream.getvalue()
    assert not set(written) & set("\r\x1b\u2028")
    lines = written.split("\n")
    assert lines.pop() == ""
    if style == "json":
        assert [json.loads(line)["level"] for line in lines] == ["INFO", "WARNING", "ERROR"]
        assert "ValueError: rosebud\n" in json.loads(lines[2])["exception"]
        assert json.loads(lines[2])["message"] == "failed"
        assert json.loads(lines[1])["message"] == f"said {FORGED}"
    else:
        entries = [line for line in lines if not line.startswith("    ")]
        assert [entry.split()[1] for entry in entries] == ["INFO", "WARNING", "ERROR"]
        assert any(line.startswith("    ValueError: rosebud") for line in lines)
        assert r"rosebud\n2026" in entries[1]


@pytest.mark.parametrize("endpoint", ["/health", "/ready", "/metrics", "/version"])
def test_what_is_asked_for_all_the_time_is_logged_when_debugging_only(endpoint: str) -> None:
    sink = LogSink(with_content=False)
    with logging_as("json") as stream:
        sink.record(record(endpoint=endpoint))
        assert stream.getvalue() == ""
        requests = logging.getLogger("steerserve.requests")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(requests, "level", logging.DEBUG)
            patch.setattr(requests, "_cache", {})
            sink.record(record(endpoint=endpoint))
    assert json.loads(stream.getvalue())["level"] == "DEBUG"


def client_of(engine: TorchEngine, registry: Registry, *, log_content: bool) -> httpx.AsyncClient:
    """Return a client of an application that logs its requests."""
    settings = Settings.model_validate(
        {"served_model_names": ("tiny",), "log_content": log_content}
    )
    metrics, sinks = Metrics(engine, registry, "tiny"), [LogSink(with_content=log_content)]
    app = create_app(engine, registry, metrics, None, settings, sinks)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_a_real_application_logs_no_text_of_a_client(
    chat_engine: TorchEngine, registry: Registry
) -> None:
    with logging_as("json") as stream:
        async with client_of(chat_engine, registry, log_content=False) as client:
            answers = [
                await complete(client, prompt=SECRET, stop=SECRET),
                await complete(client, prompt=SECRET, stream=True),
                await chat(client, messages=[user(SECRET)]),
                await complete(client, model=SECRET),
                await complete(client, model=f"tiny+{SECRET}"),
                await complete(client, steering={"intervention": SECRET}),
                await complete(client, rosebud=SECRET),
                await client.get(f"/{SECRET}?{SECRET}"),
                await client.request(SECRET, "/v1/models"),
            ]
            await client.get("/health")
    lines: list[Json] = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == [
        answer.headers["x-request-id"] for answer in answers
    ]
    assert [line["status"] for line in lines] == [200, 200, 200, 404, 404, 404, 400, 404, 405]
    assert {line["logger"] for line in lines} == {"steerserve.requests"}
    assert lines[-1]["method"] == "_OTHER"
    assert "rosebud" not in stream.getvalue().lower()


async def test_a_real_application_logs_what_it_generates(
    chat_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"), "maps")
    with logging_as("json") as stream:
        async with client_of(chat_engine, registry, log_content=True) as client:
            answer = (await complete(client, prompt=[SECRET, "x"], model="tiny+maps")).json()
            said = (await chat(client, messages=[user(SECRET)])).json()
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["interventions"] == [
        {"name": "maps", "digest": registry.resolve("maps").digest, "kind": "affine"}
    ]
    assert (first["operation"], first["response_id"]) == ("text_completion", answer["id"])
    assert (first["model"], first["choices"]) == ("tiny+maps", 2)
    assert first["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert first["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert first["finish_reasons"] == [each["finish_reason"] for each in answer["choices"]]
    assert first["completions"] == [each["text"] for each in answer["choices"]]
    assert first["prompts"] == [{"role": "user", "text": text} for text in (SECRET, "x")]
    assert 0 < first["queue_seconds"] < first["first_token_seconds"] < first["seconds"] < 10
    assert second["operation"] == "chat"
    assert second["interventions"] == []
    assert second["completions"] == [said["choices"][0]["message"]["content"]]
    assert second["prompts"] == [{"role": "user", "text": SECRET}]


PROCESS = """
import logging, warnings, uvicorn
from server.logs import configure_logging
configure_logging("json")
uvicorn.Config(None, log_config=None, log_level="info", access_log=False)
logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "coloured"})
logging.getLogger("uvicorn.access").info("a client's path")
logging.getLogger("httpx").info("noise")
logging.getLogger("anything").warning("heard")
warnings.warn("odd")
"""


def test_uvicorns_lines_and_warnings_come_in_the_same_format() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=60, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("uvicorn.error", "INFO"),
        ("anything", "WARNING"),
        ("py.warnings", "WARNING"),
    ]
    assert set(lines[0]) == {"time", "level", "logger", "message"}
    assert "UserWarning: odd" in lines[2]["message"]
    assert done.stdout == ""
