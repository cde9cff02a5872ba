"""Counts every HTTP request by its route and its outcome, in plain ASGI."""

from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST
from server.metrics import Metrics

SUCCESS: Final = "success"
CLIENT_ERROR: Final = "client_error"
REJECTED: Final = "rejected"  # the queue is full
UNAVAILABLE: Final = "unavailable"
SERVER_ERROR: Final = "server_error"
CANCELLED: Final = "cancelled"
UNMATCHED: Final = "unmatched"


class RequestCountMiddleware:
    """Feeds `requests_total`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        complete = False

        async def watch(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body":
                complete = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watch)
        finally:
            # An answer that began well and was never completed lost its reader on the way.
            outcome = outcome_of(status) if complete or status >= 500 else CANCELLED
            self._metrics.answered(_endpoint(scope), scope.get("state", {}).get("outcome", outcome))


def set_outcome(request: Request, outcome: str) -> None:
    """State the outcome of an answer whose status, already sent, cannot tell it."""
    request.state.outcome = outcome


def outcome_of(status: int) -> str:
    """The outcome that an answer's status tells."""
    if status < 400:
        return SUCCESS
    if status == CLIENT_CLOSED_REQUEST:
        return CANCELLED
    if status == 429:
        return REJECTED
    if status == 503:
        return UNAVAILABLE
    return CLIENT_ERROR if status < 500 else SERVER_ERROR


def _endpoint(scope: Scope) -> str:
    """The matched route's template: a path of the client's choosing must not become a label."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED
