"""Sends an OpenTelemetry span for each generating request. Needs the extra `otel`."""

import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.config import ConfigurationError
from server.records import GenerationRecord, MessageRecord, RequestRecord
from server.version import installed_version

T = TypeVar("T")
Attribute: TypeAlias = str | bool | int | float | Sequence[str]

PROVIDER: Final = "steerserve"
FIRST_EVENT: Final = "steerserve.first_token"
LONGEST_CONTENT: Final = 16_000  # characters of prompts, and as many of completions, in a span
MESSAGE_COST: Final = 64  # characters that a message counts for beside its text

_TRACES_PATH: Final = "/v1/traces"
_EXPORT_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 5.0
_NANOSECONDS: Final = 1_000_000_000
_FAILED: Final = frozenset({"server_error", "unavailable"})

logger = logging.getLogger(__name__)


class TraceSink:
    """Makes a span of each request that generates, when the request has ended.

    The attributes have the names of OpenTelemetry's GenAI conventions. They are written out here,
    because the package that defines them marks them as deprecated since they moved to another
    repository.
    """

    def __init__(self, processor: SpanProcessor, *, with_content: bool) -> None:
        """Spans go to `processor`; with prompts and completions only if `with_content`."""
        own = {"service.name": PROVIDER, "service.version": installed_version()}
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(PROVIDER, installed_version())
        self._propagator = TraceContextTextMapPropagator()
        self._with_content = with_content

    def record(self, record: RequestRecord) -> None:
        """Make the span, as a child of the caller's span if the request names one."""
        generation = record.generation
        if generation is None:
            return
        attributes = _attributes_of(record) | _generation_attributes(generation)
        if self._with_content:
            attributes |= _content_attributes(generation)
        headers = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        span = self._tracer.start_span(
            f"{generation.operation} {generation.model}",
            context=self._propagator.extract(_known(headers)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=record.started_ns,
        )
        if generation.first_token_seconds is not None:
            span.add_event(FIRST_EVENT, timestamp=_after(record, generation.first_token_seconds))
        if record.outcome in _FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(_after(record, record.seconds))

    def close(self) -> None:
        """Send the waiting spans, for a few seconds at most."""
        # The SDK's own limit is 30 s and cannot be set.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def open_trace_sink(endpoint: str, *, with_content: bool) -> TraceSink:
    """Make a sink that sends its spans in batches, from a thread, to a collector.

    Args:
        endpoint: the collector's base URL, for OTLP over HTTP, such as http://localhost:4318.
        with_content: whether spans carry prompts and completions.

    Raises:
        ConfigurationError: the endpoint is no such URL.
    """
    url, host = _traces_url(endpoint)
    # OpenTelemetry logs every try of every failed batch; `SteadyExporter` logs a failure once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporter = SteadyExporter(OTLPSpanExporter(url, timeout=_EXPORT_SECONDS), host)
    return TraceSink(BatchSpanProcessor(exporter), with_content=with_content)


class SteadyExporter(SpanExporter):
    """Wraps an exporter; logs once when exports begin to fail, and once when they work again."""

    def __init__(self, exporter: SpanExporter, collector: str) -> None:
        """`collector` is the collector's name in the log."""
        self._exporter = exporter
        self._collector = collector
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; those that cannot be sent are lost."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            # Only the error's type is logged, because its message may quote the spans.
            logger.debug("An export failed: %s", type(error).__name__)
            result = SpanExportResult.FAILURE
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            logger.warning("Traces do not reach %s; they are lost until they do.", self._collector)
        elif self._failing and not failing:
            logger.info("Traces reach %s again.", self._collector)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()


def _traces_url(endpoint: str) -> tuple[str, str]:
    """Return the URL to send spans to, and its name in the log, without a password."""
    wrong = ConfigurationError(
        "the OTLP endpoint must be a collector's base URL for OTLP over HTTP, such as "
        "http://localhost:4318"
    )
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise wrong from error
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise wrong
    url = endpoint.rstrip("/")
    if not url.endswith(_TRACES_PATH):
        url += _TRACES_PATH
    return url, host if port is None else f"{host}:{port}"


def _attributes_of(record: RequestRecord) -> dict[str, Attribute]:
    failed = record.outcome in _FAILED
    return _known(
        {
            "http.request.method": record.method,
            "http.route": record.endpoint,
            "http.response.status_code": record.status,
            "error.type": (record.error_code or str(record.status)) if failed else None,
            "steerserve.request_id": record.request_id,
            "steerserve.outcome": record.outcome,
        }
    )


def _generation_attributes(generation: GenerationRecord) -> dict[str, Attribute]:
    interventions = generation.interventions
    return _sampling_attributes(generation) | _known(
        {
            "gen_ai.operation.name": generation.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.output.type": "text",
            "gen_ai.request.model": generation.model,
            "gen_ai.request.stream": generation.stream,
            "gen_ai.request.choice.count": generation.choices,
            "gen_ai.response.model": generation.served_model,
            "gen_ai.response.id": generation.response_id,
            "gen_ai.response.finish_reasons": tuple(filter(None, generation.finish_reasons)),
            "gen_ai.response.time_to_first_chunk": generation.first_token_seconds,
            "gen_ai.usage.input_tokens": generation.prompt_tokens,
            "gen_ai.usage.output_tokens": generation.completion_tokens,
            "steerserve.queue_seconds": generation.queue_seconds,
            "steerserve.interventions": tuple(each.name for each in interventions),
            "steerserve.intervention.digests": tuple(each.digest for each in interventions),
            "steerserve.intervention.kinds": tuple(each.kind for each in interventions),
        }
    )


def _sampling_attributes(generation: GenerationRecord) -> dict[str, Attribute]:
    """Return the sampling settings. Stop strings are left out: they are the client's text."""
    sampling = generation.sampling
    if sampling is None:
        return {}
    return _known(
        {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.seed": sampling.seed,
        }
    )


def _content_attributes(generation: GenerationRecord) -> dict[str, Attribute]:
    """Return the texts in the conventions' JSON, cut to size because spans wait in memory."""
    answers = [MessageRecord("assistant", text) for text in generation.completions]
    answered = _messages(answers)
    for message, reason in zip(answered, generation.finish_reasons, strict=False):
        message["finish_reason"] = reason or "error"
    return {
        "gen_ai.input.messages": json.dumps(_messages(generation.prompts)),
        "gen_ai.output.messages": json.dumps(answered),
    }


def _messages(messages: Iterable[MessageRecord]) -> list[dict[str, object]]:
    left = LONGEST_CONTENT
    shown: list[dict[str, object]] = []
    for message in messages:
        if left <= 0:
            break
        text = message.text[:left]
        left -= len(text) + MESSAGE_COST
        shown.append({"role": message.role, "parts": [{"type": "text", "content": text}]})
    return shown


def _known(values: Mapping[str, T | None]) -> dict[str, T]:
    return {name: value for name, value in values.items() if value is not None}


def _after(record: RequestRecord, seconds: float) -> int:
    return record.started_ns + int(seconds * _NANOSECONDS)
