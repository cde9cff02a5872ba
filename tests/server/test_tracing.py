"""Tests of trace spans: their attributes, their parents, and collectors that are down or hang."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode

from interventions.registry import Registry
from server import tracing
from server.app import create_app
from server.cli.launch import load_trace_sink
from server.config import Settings
from server.engine.request import SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.metrics import Metrics
from server.records import (
    GenerationRecord,
    InterventionRecord,
    MessageRecord,
    RequestRecord,
)
from server.tracing import LONGEST_CONTENT, SteadyExporter, TraceSink
from tests.serving import complete

DIGEST = "0123456789abcdef" * 4
SECRET = "rosebud"
STARTED = 1_000_000_000 * 10**9
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"

EXPECTED = {
    "http.request.method": "POST",
    "http.route": "/v1/chat/completions",
    "http.response.status_code": 200,
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "steerserve",
    "gen_ai.output.type": "text",
    "gen_ai.request.model": "tiny+detox",
    "gen_ai.request.stream": True,
    "gen_ai.request.choice.count": 2,
    "gen_ai.request.max_tokens": 9,
    "gen_ai.request.temperature": 0.5,
    "gen_ai.request.top_p": 0.9,
    "gen_ai.request.top_k": 7,
    "gen_ai.request.presence_penalty": 2.0,
    "gen_ai.request.frequency_penalty": -2.0,
    "gen_ai.request.seed": 3,
    "gen_ai.response.model": "tiny",
    "gen_ai.response.id": "chatcmpl-1",
    "gen_ai.response.finish_reasons": ("stop",),
    "gen_ai.response.time_to_first_chunk": 0.25,
    "gen_ai.usage.input_tokens": 5,
    "gen_ai.usage.output_tokens": 12,
    "steerserve.request_id": "abc123",
    "steerserve.outcome": "success",
    "steerserve.queue_seconds": 0.125,
    "steerserve.interventions": ("detox", "calm"),
    "steerserve.intervention.digests": (DIGEST, "f" * 64),
    "steerserve.intervention.kinds": ("affine", "reward"),
}


@pytest.fixture(autouse=True)
def quiet_sdk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the SDK's settings from the environment; restore its log level after the test."""
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    level = logging.getLogger("opentelemetry").level
    yield
    logging.getLogger("opentelemetry").setLevel(level)


def generation() -> GenerationRecord:
    """Return the record of a generation with every field filled in."""
    return GenerationRecord(
        operation="chat",
        response_id="chatcmpl-1",
        model="tiny+detox",
        served_model="tiny",
        stream=True,
        choices=2,
        interventions=[
            InterventionRecord("detox", DIGEST, "affine"),
            InterventionRecord("calm", "f" * 64, "reward"),
        ],
        sampling=SamplingSettings(
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            presence_penalty=2.0,
            frequency_penalty=-2.0,
            seed=3,
            stop=(SECRET,),
        ),
        prompt_tokens=5,
        completion_tokens=12,
        finish_reasons=["stop", None],
        queue_seconds=0.125,
        first_token_seconds=0.25,
        prompts=[MessageRecord("system", "Be kind."), MessageRecord("user", SECRET)],
        completions=[f"{SECRET}!", "Ro"],
    )


def record(**fields: object) -> RequestRecord:
    """Return the record of a chat that succeeded, with these fields changed."""
    made = RequestRecord("abc123", "POST", STARTED)
    made.endpoint, made.status, made.outcome = "/v1/chat/completions", 200, "success"
    made.seconds, made.generation = 1.5, generation()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def spans_of(*records: RequestRecord, with_content: bool = False) -> tuple[ReadableSpan, ...]:
    """Return the spans that a trace sink makes of these records."""
    exporter = InMemorySpanExporter()
    sink = TraceSink(SimpleSpanProcessor(exporter), with_content=with_content)
    for each in records:
        sink.record(each)
    sink.close()
    return exporter.get_finished_spans()


def attributes_of(*records: RequestRecord, with_content: bool = False) -> Mapping[str, object]:
    """Return the attributes of the only span that these records give."""
    [span] = spans_of(*records, with_content=with_content)
    assert span.attributes is not None
    return dict(span.attributes)


def test_a_span_says_what_was_asked_and_given() -> None:
    [span] = spans_of(record())
    assert span.name == "chat tiny+detox"
    assert span.kind is SpanKind.SERVER
    assert (span.start_time, span.end_time) == (STARTED, STARTED + 1_500_000_000)
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None
    [event] = span.events
    assert (event.name, event.timestamp) == ("steerserve.first_token", STARTED + 250_000_000)
    assert dict(span.attributes or {}) == EXPECTED
    assert span.resource.attributes["service.name"] == "steerserve"
    assert span.resource.attributes["service.version"]
    assert span.resource.attributes["telemetry.sdk.language"] == "python"


def test_the_names_are_the_conventions_own() -> None:
    modules = (gen_ai_attributes, http_attributes, error_attributes)
    known = {value for module in modules for value in vars(module).values() if type(value) is str}
    failed = record(status=500, outcome="server_error")
    names = set(attributes_of(failed, with_content=True))
    assert {name for name in names if not name.startswith("steerserve.")} <= known
    assert {"error.type", "gen_ai.input.messages", "gen_ai.output.messages"} < names


def test_what_is_not_known_is_left_out() -> None:
    bare = GenerationRecord("text_completion", "cmpl-1", "tiny", "tiny")
    [span] = spans_of(record(generation=bare, status=400, outcome="client_error"))
    assert span.name == "text_completion tiny"
    assert span.events == ()
    assert span.status.status_code is StatusCode.UNSET
    attributes = dict(span.attributes or {})
    assert "gen_ai.request.seed" not in attributes
    assert "gen_ai.response.time_to_first_chunk" not in attributes
    assert attributes["steerserve.interventions"] == ()


def test_requests_that_generate_nothing_make_no_span() -> None:
    assert spans_of(record(generation=None)) == ()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"status": 500, "outcome": "server_error"}, "500"),
        (
            {"status": 503, "outcome": "unavailable", "error_code": "engine_dead"},
            "engine_dead",
        ),
        ({"status": 200, "outcome": "server_error", "error_code": "step_failed"}, "step_failed"),
        ({"status": 429, "outcome": "rejected", "error_code": "queue_full"}, None),
        ({"status": 499, "outcome": "cancelled"}, None),
    ],
)
def test_only_the_servers_own_failures_are_errors(
    fields: Mapping[str, object], error: str | None
) -> None:
    [span] = spans_of(record(**fields))
    failed = span.status.status_code is StatusCode.ERROR
    assert failed is (error is not None)
    assert (span.attributes or {}).get("error.type") == error


def test_content_is_there_only_where_it_is_asked_for() -> None:
    [span] = spans_of(record())
    assert SECRET not in span.to_json()
    attributes = attributes_of(record(), with_content=True)
    assert json.loads(str(attributes["gen_ai.input.messages"])) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be kind."}]},
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]},
    ]
    assert json.loads(str(attributes["gen_ai.output.messages"])) == [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": f"{SECRET}!"}],
            "finish_reason": "stop",
        },
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": "Ro"}],
            "finish_reason": "error",
        },
    ]


@pytest.mark.parametrize("texts", [["x" * 10**6], ["x"] * 10**4, [""] * 10**4])
def test_content_has_a_bounded_size(texts: Sequence[str]) -> None:
    made = generation()
    made.prompts = [MessageRecord("user", text) for text in texts]
    text = str(attributes_of(record(generation=made), with_content=True)["gen_ai.input.messages"])
    assert LONGEST_CONTENT / 2 < len(text) < LONGEST_CONTENT * 2
    assert json.loads(text)


@pytest.mark.parametrize(
    "traceparent", [None, "", "nonsense\n", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"]
)
def test_without_a_parent_a_span_begins_a_trace(traceparent: str | None) -> None:
    first, second = spans_of(record(traceparent=traceparent), record(traceparent=traceparent))
    assert first.parent is None
    assert first.context is not None
    assert second.context is not None
    assert first.context.trace_id != second.context.trace_id


def test_a_caller_who_samples_nothing_gets_nothing() -> None:
    assert spans_of(record(traceparent=f"00-{TRACE}-{PARENT}-00")) == ()


def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    [span] = spans_of(record())
    assert span.resource.attributes["service.name"] == "mine"


async def test_a_real_application_makes_spans(tiny_engine: TorchEngine, registry: Registry) -> None:
    exporter = InMemorySpanExporter()
    sink = TraceSink(SimpleSpanProcessor(exporter), with_content=False)
    settings = Settings.model_validate({"served_model_names": ("tiny",)})
    metrics = Metrics(tiny_engine, registry, "tiny")
    app = create_app(tiny_engine, registry, metrics, None, settings, [sink])
    before = time.time_ns()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app),
        base_url="http://localhost",
        headers={"traceparent": TRACEPARENT},
    ) as client:
        answer = await complete(client, prompt=SECRET, stop=SECRET, seed=3)
        await complete(client, prompt=SECRET, model=SECRET)
        await client.get("/v1/models")
    [span] = exporter.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    attributes = span.attributes or {}
    assert attributes["gen_ai.response.id"] == answer.json()["id"]
    assert attributes["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert attributes["gen_ai.request.seed"] == 3
    assert attributes["steerserve.request_id"] == answer.headers["x-request-id"]
    assert span.start_time is not None
    assert span.end_time is not None
    assert before <= span.start_time < span.events[0].timestamp < span.end_time <= time.time_ns()
    assert SECRET not in span.to_json()


@dataclass
class Collector:
    """The requests that a local OTLP receiver got."""

    url: str
    paths: list[str] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """All spans that came, in order."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector that receives OTLP over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/x-protobuf"
            collector.paths.append(self.path)
            collector.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join(10)


def value_of(value: AnyValue) -> object:
    """Convert an attribute's protobuf value to Python."""
    kind = value.WhichOneof("value")
    assert kind is not None
    if kind == "array_value":
        return tuple(value_of(each) for each in value.array_value.values)
    return getattr(value, kind)


def values_of(pairs: Sequence[KeyValue]) -> dict[str, object]:
    """Convert protobuf attributes to a dictionary."""
    return {pair.key: value_of(pair.value) for pair in pairs}


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_a_collector_gets_the_span(path: str) -> None:
    failed = record(status=500, outcome="server_error")
    with collecting() as collector:
        sink = load_trace_sink(collector.url + path, with_content=False)
        sink.record(record(traceparent=TRACEPARENT, tracestate="vendor=1"))
        sink.record(failed)
        sink.close()
        assert set(collector.paths) == {"/v1/traces"}
        span, other = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.trace_state == "vendor=1"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.start_time_unix_nano == STARTED
    assert span.end_time_unix_nano == STARTED + 1_500_000_000
    assert span.events[0].time_unix_nano == STARTED + 250_000_000
    assert values_of(span.attributes) == EXPECTED
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert other.status.code == Status.STATUS_CODE_ERROR
    assert other.parent_span_id == b""
    [resource] = collector.requests[0].resource_spans
    assert values_of(resource.resource.attributes)["service.name"] == "steerserve"


@contextmanager
def hanging() -> Iterator[str]:
    """Run a collector that accepts connections and never answers; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://user:hunter2@127.0.0.1:{listener.getsockname()[1]}"


def test_a_collector_that_hangs_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(tracing, "_EXPORT_SECONDS", 0.1)
    threads = set(threading.enumerate())
    with hanging() as url:
        sink = load_trace_sink(url, with_content=False)
        began = time.perf_counter()
        for _ in range(2100):  # more than the queue of spans holds
            sink.record(record())
        recorded = time.perf_counter()
        sink.close()
        closed = time.perf_counter()
        for thread in set(threading.enumerate()) - threads:
            thread.join(20)
            assert not thread.is_alive()
    assert recorded - began < 10
    assert closed - recorded < 5
    [entry] = caplog.records
    assert entry.levelno == logging.WARNING
    assert entry.getMessage().startswith("Traces do not reach 127.0.0.1:")
    assert "hunter2" not in caplog.text


class Stuck(SpanProcessor):
    """A span processor whose `shutdown` hangs until `release` is set."""

    def __init__(self) -> None:
        self.closing, self.release = threading.Event(), threading.Event()

    def shutdown(self) -> None:
        self.closing.set()
        self.release.wait(50)


def test_closing_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_SECONDS", 0.05)
    stuck = Stuck()
    began = time.perf_counter()
    TraceSink(stuck, with_content=False).close()
    assert time.perf_counter() - began < 20
    assert stuck.closing.wait(10)
    stuck.release.set()


class Flaky(SpanExporter):
    """An exporter that returns or raises the given results, one an export."""

    def __init__(self, results: Sequence[SpanExportResult | Exception]) -> None:
        self._results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def test_a_collector_that_is_down_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    works, fails = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
    raises = ValueError(SECRET)
    results = (works, fails, raises, fails, works, works, raises, fails)
    exporter = SteadyExporter(Flaky(results), "there")
    for _ in results:
        exporter.export(())
    assert [entry.getMessage() for entry in caplog.records] == [
        "Traces do not reach there; they are lost until they do.",
        "Traces reach there again.",
        "Traces do not reach there; they are lost until they do.",
    ]


def test_nothing_imports_opentelemetry_unless_it_is_asked_for() -> None:
    code = (
        "import sys, server.logs, server.records; "
        "print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
