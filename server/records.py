"""The record of one HTTP request, and the sinks that get it at the request's end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, get_args

from server.engine.request import SamplingSettings

Operation: TypeAlias = Literal["text_completion", "chat"]
Outcome: TypeAlias = Literal[
    "success",
    "client_error",
    "rejected",  # the queue is full
    "unavailable",  # a 503: the server is not ready, stops, or lacks room for an intervention
    "server_error",  # another error of the server's, such as a timeout
    "cancelled",
]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

UNMATCHED: Final = "unmatched"  # the endpoint of a path that no route has


@dataclass(frozen=True, slots=True)
class InterventionRecord:
    """One intervention that a request was steered by."""

    name: str
    digest: str
    kind: str


@dataclass(frozen=True, slots=True)
class MessageRecord:
    """A prompt, or one message of a conversation."""

    role: str  # a completion's prompt is the user's
    text: str


@dataclass(slots=True)
class GenerationRecord:
    """The record of a request that generates, as far as the request came.

    It has prompts and completions only if the operator wants them logged.
    """

    operation: Operation
    response_id: str
    model: str  # the model name in the request; the server has it
    served_model: str  # the main name of the loaded model
    stream: bool = False
    choices: int = 1
    interventions: Sequence[InterventionRecord] = ()
    sampling: SamplingSettings | None = None  # of the first choice
    prompt_tokens: int = 0  # each prompt once
    completion_tokens: int = 0  # of all choices
    finish_reasons: Sequence[str | None] = ()  # of each choice; None if it has not finished
    queue_seconds: float | None = None  # of the first choice to be scheduled
    first_token_seconds: float | None = None  # from the request's arrival
    prompts: Sequence[MessageRecord] = ()  # empty unless content is logged
    completions: Sequence[str] = ()  # empty unless content is logged; one text for each choice


@dataclass(slots=True)
class RequestRecord:
    """The record of one HTTP request. A sink gets it when the request has ended."""

    request_id: str
    method: str  # `_OTHER` if it is none of HTTP's own
    started_ns: int  # Unix time
    traceparent: str | None = None  # W3C's headers, as they came
    tracestate: str | None = None
    endpoint: str = UNMATCHED  # the route's template, never the client's path
    status: int = 500
    outcome: Outcome = "server_error"
    seconds: float = 0.0  # to the end of the answer
    error_code: str | None = None  # `code` in the answer's error object
    generation: GenerationRecord | None = None


class RecordSink(Protocol):
    """Gets the record of every request at its end, on the event loop, so it must be quick."""

    def record(self, record: RequestRecord) -> None:
        """Take a request's record. An exception is logged, and does not fail the request."""


class ClosableSink(RecordSink, Protocol):
    """A sink that delivers records later."""

    def close(self) -> None:
        """Deliver waiting records, or drop them after a few seconds. No other call may follow."""
