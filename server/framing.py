"""Reads and writes HTTP/1.1 on one connection, more strictly than h11."""

from typing import Any, Final

import h11
from uvicorn.server import ServerState as UvicornState

LONGEST_HEAD: Final = 16 * 1024  # bytes of a request's first line and headers
_EVENT_STREAM: Final = b"text/event-stream"


class ServerState(UvicornState):
    """The state that all connections of a server share."""

    def __init__(self) -> None:
        super().__init__()
        self.closes_connections = False  # True if each connection is closed after its next answer


class HttpConnection(h11.Connection):
    """h11's connection, which also refuses ambiguous bodies, and remembers the fault."""

    def __init__(self, server_state: ServerState) -> None:
        super().__init__(h11.SERVER, LONGEST_HEAD)
        self._server_state = server_state
        self.problem = h11.RemoteProtocolError("the request is not HTTP")
        self.method: bytes | None = None
        self.streams_events = False  # True if the answer has begun and is an event stream
        self.events = 0  # number of events read so far

    def start_next_cycle(self) -> None:
        """Get ready for the connection's next request."""
        super().start_next_cycle()
        self.method = None

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError: the data is not HTTP/1, or a body has two lengths.
        """
        try:
            event = super().next_event()
            self.events += event is not h11.NEED_DATA
            if isinstance(event, h11.Request):
                self.method = event.method
                _check_version(event)
                _check_framing(event)
        except h11.RemoteProtocolError as error:
            self.problem = error
            raise
        return event

    def send(self, event: Any) -> Any:  # h11 overloads it by the event's type
        """Return the bytes to send for an event."""
        if isinstance(event, h11.Response):
            self.streams_events = any(
                name == b"content-type" and value.startswith(_EVENT_STREAM)
                for name, value in event.headers
            )
            if self._server_state.closes_connections:
                event = _with_connection_close(event)
        return super().send(event)


def _with_connection_close(answer: h11.Response) -> h11.Response:
    headers = [header for header in answer.headers if header[0] != b"connection"]
    return h11.Response(
        status_code=answer.status_code,
        headers=[*headers, (b"connection", b"close")],
        reason=answer.reason,
    )


def _check_version(request: h11.Request) -> None:
    if not request.http_version.startswith(b"1."):
        version = request.http_version.decode("ascii")
        raise h11.RemoteProtocolError(f"it is HTTP/{version}, not HTTP/1.1")


def _check_framing(request: h11.Request) -> None:
    """Refuse a request whose body may end elsewhere for another server (request smuggling)."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding")
    if request.http_version == b"1.0":
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
