"""Gives every HTTP request an id, counts it, and records it at its end, in plain ASGI."""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST
from server.metrics import Metrics
from server.records import OUTCOMES, UNMATCHED, Outcome, RecordSink, RequestRecord

REQUEST_ID_HEADER: Final = "x-request-id"  # the one that OpenAI's clients show
GENERATING_ENDPOINTS: Final = ("/v1/completions", "/v1/chat/completions")

_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
_OTHER_METHOD: Final = "_OTHER"  # OpenTelemetry's name for a method that a client has made up
_LONGEST_TRACE_HEADER: Final = 512  # characters; W3C asks to pass on at least so many

logger = logging.getLogger(__name__)


class RequestObserver:
    """Gives every request an id and a record, feeds `requests_total`, and hands the record on."""

    def __init__(self, app: ASGIApp, metrics: Metrics, sinks: Sequence[RecordSink] = ()) -> None:
        self._app = app
        self._metrics = metrics
        self._sinks = tuple(sinks)
        for endpoint in GENERATING_ENDPOINTS:
            metrics.expect(endpoint, OUTCOMES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record = _new_record(scope)
        scope.setdefault("state", {})["record"] = record
        answer = _Answer(send, record)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            record.seconds = time.perf_counter() - began
            self._end(scope, record, complete=answer.complete)

    def _end(self, scope: Scope, record: RequestRecord, *, complete: bool) -> None:
        state = scope["state"]
        record.endpoint = _endpoint(scope)
        # An answer that began well but was never completed has lost its client.
        whole = complete or record.status >= 500
        record.outcome = state.get("outcome", outcome_of(record.status) if whole else "cancelled")
        record.error_code = state.get("error_code")  # set by the code that makes error envelopes
        self._metrics.requests.labels(record.endpoint, record.outcome).inc()
        for sink in self._sinks:
            try:
                sink.record(record)
            except Exception:
                logger.exception("A sink of request records failed")


@dataclass(slots=True)
class _Answer:
    """Sends an answer on to the client, and notes its status and whether it is complete."""

    _send: Send
    _record: RequestRecord
    complete: bool = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            name, value = REQUEST_ID_HEADER.encode(), self._record.request_id.encode()
            message = {**message, "headers": [*message.get("headers", ()), (name, value)]}
        await self._send(message)
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)


def record_of(request: HTTPConnection) -> RequestRecord:
    """Return the request's record, for its route to fill in."""
    record = request.state.record
    assert isinstance(record, RequestRecord)
    return record


def set_outcome(request: Request, outcome: Outcome) -> None:
    """Set the outcome of an answer that fails after its status was sent."""
    request.state.outcome = outcome


def outcome_of(status: int) -> Outcome:
    """Return the outcome that an answer's status stands for."""
    if status < 400:
        return "success"
    if status == CLIENT_CLOSED_REQUEST:
        return "cancelled"
    if status == 429:
        return "rejected"
    if status == 503:
        return "unavailable"
    return "client_error" if status < 500 else "server_error"


def _new_record(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    method = scope["method"]
    return RequestRecord(
        request_id=uuid.uuid4().hex,
        method=method if method in _METHODS else _OTHER_METHOD,
        started_ns=time.time_ns(),
        traceparent=_trace_header(headers, "traceparent"),
        tracestate=_trace_header(headers, "tracestate"),
    )


def _trace_header(headers: Headers, name: str) -> str | None:
    value = headers.get(name)
    return None if value is None or len(value) > _LONGEST_TRACE_HEADER else value


def _endpoint(scope: Scope) -> str:
    """Return the matched route's template: a path that a client chooses must not become a label."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED
