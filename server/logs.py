"""Writes logs to standard error, as text or as one JSON object a line; one line a request."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

from pydantic import JsonValue
from pythonjsonlogger.core import RESERVED_ATTRS, LogData
from pythonjsonlogger.json import JsonFormatter

from server.records import RequestRecord

LogFormat: TypeAlias = Literal["text", "json"]

# The endpoints that operators' tools request all the time.
QUIET_ENDPOINTS: Final = frozenset({"/health", "/ready", "/metrics", "/version"})

# Loggers that log from INFO on; all others log from WARNING on.
_OWN_LOGGERS: Final = ("interventions", "server", "steering", "steerserve", "uvicorn")
# Libraries that write to standard error by themselves, in a format of their own.
_LOGGERS_WITH_HANDLERS: Final = ("huggingface_hub", "transformers")
# The attributes of a log record that carry a request's values, for JSON and for text.
_FIELDS: Final = "steerserve_fields"
_DETAILS: Final = "steerserve_details"
_SHORT_DIGEST: Final = 12
_TEXT_KEYS: Final = (
    *("seconds", "request_id", "error_code", "model", "interventions", "tokens", "finished"),
    *("queue_seconds", "first_token_seconds", "prompts", "completions"),
)
_PLAIN: Final = re.compile(r"[\w.:/+@,-]+", re.ASCII)

logger = logging.getLogger("steerserve.requests")


def configure_logging(style: LogFormat) -> None:
    """Send every logger's lines to standard error in one format, Python's warnings too.

    To be called once, by the process that serves: it replaces the root logger's handlers.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in _LOGGERS_WITH_HANDLERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)


class LogSink:
    """Logs each request at its end, at INFO, or at DEBUG for the quiet endpoints."""

    def __init__(self, *, with_content: bool) -> None:
        self._with_content = with_content

    def record(self, record: RequestRecord) -> None:
        """Log the request."""
        level = logging.DEBUG if record.endpoint in QUIET_ENDPOINTS else logging.INFO
        if not logger.isEnabledFor(level):
            return
        fields = fields_of(record, with_content=self._with_content)
        details = _details_of(record, fields)
        message = f"{record.method} {record.endpoint} {record.status} {record.outcome}"
        logger.log(level, "%s", message, extra={_FIELDS: fields, _DETAILS: details})


class TextLines(logging.Formatter):
    """Formats lines for people. Text from a client cannot begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by a traceback's lines, indented."""
        head = f"{_time_of(record)} {record.levelname} {record.name}: "
        lines = [head + _on_one_line(record.getMessage().rstrip())]
        lines[0] += getattr(record, _DETAILS, "")
        if record.exc_info:
            lines += _indented(self.formatException(record.exc_info))
        if record.stack_info:
            lines += _indented(self.formatStack(record.stack_info))
        return "\n".join(lines)


class JsonLines(JsonFormatter):
    """Formats JSON objects with `time`, `level`, `logger`, `message`, and a request's own keys."""

    def __init__(self) -> None:
        names = {"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"}
        super().__init__(
            ("asctime", "levelname", "name", "message"),
            rename_fields=names,
            # `color_message` is uvicorn's message a second time, in colours.
            reserved_attrs=[*RESERVED_ATTRS, "color_message", _DETAILS],
        )

    def formatTime(  # noqa: N802 - logging's name
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:
        """Return the time in RFC 3339, in UTC."""
        return _time_of(record)

    def process_log_record(self, log_data: LogData) -> LogData:
        """Return the object to write."""
        fields: LogData = log_data.pop(_FIELDS, {})
        return log_data | {"message": str(log_data["message"]).rstrip()} | fields


def fields_of(record: RequestRecord, *, with_content: bool) -> dict[str, JsonValue]:
    """Return a request's keys for a JSON line. Times are in seconds; unknown values are null."""
    fields: dict[str, JsonValue] = {
        "request_id": record.request_id,
        "method": record.method,
        "endpoint": record.endpoint,
        "status": record.status,
        "outcome": record.outcome,
        "error_code": record.error_code,
        "seconds": _rounded(record.seconds),
    }
    generation = record.generation
    if generation is None:
        return fields
    fields |= {
        "operation": generation.operation,
        "response_id": generation.response_id,
        "model": generation.model,
        "stream": generation.stream,
        "interventions": [asdict(each) for each in generation.interventions],
        "choices": generation.choices,
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "finish_reasons": list(generation.finish_reasons),
        "queue_seconds": _rounded(generation.queue_seconds),
        "first_token_seconds": _rounded(generation.first_token_seconds),
    }
    if with_content:
        fields["prompts"] = [asdict(each) for each in generation.prompts]
        fields["completions"] = list(generation.completions)
    return fields


def _details_of(record: RequestRecord, fields: Mapping[str, JsonValue]) -> str:
    """Return a request's known values for a text line, each as ` key=value`."""
    details = dict(fields)
    if (generation := record.generation) is not None:
        details["interventions"] = ",".join(
            f"{each.name}@{each.digest.removeprefix('sha256:')[:_SHORT_DIGEST]}"
            for each in generation.interventions
        )
        details["tokens"] = f"{generation.prompt_tokens}+{generation.completion_tokens}"
        details["finished"] = ",".join(filter(None, generation.finish_reasons))
    known = {key: value for key in _TEXT_KEYS if (value := details.get(key)) not in (None, "")}
    return "".join(f" {key}={_shown(value)}" for key, value in known.items())


def _shown(value: JsonValue) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)  # which escapes whatever is not ASCII


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _on_one_line(text: str) -> str:
    """Escape the text's control characters and all others that are not printable."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _indented(text: str) -> list[str]:
    return ["    " + _on_one_line(line) for line in text.splitlines()]
