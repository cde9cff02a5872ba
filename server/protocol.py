"""Serves HTTP/1.1 on one connection, more strictly and with clearer errors than uvicorn."""

import os
import socket
import uuid
from asyncio import AbstractEventLoop, Handle, TimerHandle
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import ApiError
from server.api.observe import REQUEST_ID_HEADER
from server.framing import HttpConnection, ServerState

# Seconds for which the data of a refused client is read and dropped. If the connection were closed
# at once, the client might see a reset instead of its answer.
_LINGER_SECONDS: Final = 2.0
# Data is read in pieces of _READ_BYTES. After the piece that brings _EVENTS_AT_ONCE events, other
# connections get their turn: each chunk of a body is an event, and one packet may have tens of
# thousands of chunks.
_READ_BYTES: Final = 4 * 1024
_EVENTS_AT_ONCE: Final = 128
_LONGEST_PROBLEM: Final = 200  # characters of h11's message, which quotes the request
_COMMENT: Final = b":\n\n"  # a comment of an event stream, which clients ignore

# TCP keep-alive, which notices after 40 s that a client's machine is gone. Not every system has all
# of these options.
_KEEP_ALIVE_PROBES: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class HttpProtocol(H11Protocol):
    """Uvicorn's protocol for one connection.

    Data that is not HTTP is answered with OpenAI's error envelope. A client of HTTP/1.1 that closes
    its sending side and goes on reading gets the answers to its requests.
    """

    conn: HttpConnection

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = HttpConnection(server_state)
        self._client_sent_eof = False
        self._eof_before_read = False  # True if the client sent EOF while `_unread` had data
        self._lingering: TimerHandle | None = None
        self._unread = bytearray()
        self._reading: Handle | None = None  # scheduled while `_unread` has data

    @property
    def between_requests(self) -> bool:
        """True if a request was answered and h11 has been given no byte of a further one."""
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def data_received(self, data: bytes) -> None:
        """Read the client's data, or drop it if the client was refused."""
        if self._lingering is not None:
            return
        self._unread += data
        if self._reading is None:
            self._read()
        else:
            self.transport.pause_reading()

    def _read(self) -> None:
        """Read what has come; after _EVENTS_AT_ONCE events, leave the rest for later."""
        self._reading = None
        last = self.conn.events + _EVENTS_AT_ONCE
        while self._unread and self.conn.events < last:
            if self._lingering is not None or self.transport.is_closing():
                self._unread.clear()
                break
            piece = bytes(self._unread[:_READ_BYTES])
            del self._unread[:_READ_BYTES]
            super().data_received(piece)
        if self._unread:
            self.transport.pause_reading()
            self._reading = self.loop.call_soon(self._read)
            return
        if self._eof_before_read and not self.eof_received():
            self.transport.close()
        if not self.flow.read_paused:
            self.transport.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP, and close; if an answer has begun, only close.

        `msg`, uvicorn's text, is not used: h11's own error says more.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the request's body will never be complete
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._send(_refusal(self.conn.problem))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._lingering = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's always closes
        """Tell asyncio whether to keep the connection after the client has sent EOF.

        A client that has left sends EOF, and so does one that has only closed its sending side. To
        tell them apart, the server sends data that a reading client ignores: if nobody reads it,
        the client's machine resets the connection, see `close_if_reset`.
        """
        self._eof_before_read = self._reading is not None
        if self._eof_before_read:
            return True
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if self.conn.their_http_version == b"1.0":  # HTTP/1.0 has no interim answers
            return False
        if not self._client_sent_eof:
            self._client_sent_eof = True
            self._probe()
        return True

    def on_response_complete(self) -> None:
        """Go on with the next request; close if there is none and the client has sent EOF."""
        super().on_response_complete()
        if self._client_sent_eof and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what is scheduled, and have uvicorn end the request."""
        for scheduled in (self._lingering, self._reading):
            if scheduled is not None:
                scheduled.cancel()
        super().connection_lost(exc)

    def close_if_reset(self) -> None:
        """Close the connection if its client has sent EOF and then reset it.

        The server's timer calls this often, because asyncio itself would notice a reset only at the
        next write.
        """
        if not self._client_sent_eof or self.transport.is_closing():
            return
        # If there is no free descriptor for the copy, the next call tries again.
        with suppress(OSError), _socket_of(self) as copy:
            if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()

    def _probe(self) -> None:
        """Send data that a client ignores, if the answer allows it, and turn on TCP keep-alive."""
        if self.conn.our_state is h11.SEND_RESPONSE:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim))
        elif self.conn.our_state is h11.SEND_BODY and self.conn.streams_events:
            self.transport.write(self.conn.send(h11.Data(data=_COMMENT)))
        with suppress(OSError), _socket_of(self) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE_PROBES.items():
                if hasattr(socket, name):
                    copy.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _send(self, error: ApiError) -> None:
        body = error.response.body
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (REQUEST_ID_HEADER.encode(), uuid.uuid4().hex.encode()),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        events: list[h11.Event] = [
            h11.Response(status_code=error.status, headers=headers, reason=reason)
        ]
        if self.conn.method != b"HEAD":
            events.append(h11.Data(data=bytes(body)))
        events.append(h11.EndOfMessage())
        for event in events:
            self.transport.write(self.conn.send(event))


def _refusal(problem: h11.RemoteProtocolError) -> ApiError:
    # Clients would retry after other statuses that h11 suggests, such as 501.
    status = 431 if problem.error_status_hint == 431 else 400
    told = "its head is too long" if status == 431 else str(problem)[:_LONGEST_PROBLEM]
    message = f"The request is not HTTP that this server takes: {told}."
    return ApiError(status, message, code="invalid_http_request")


def _socket_of(connection: HttpProtocol) -> socket.socket:
    """Return a copy of a connection's socket, to be closed after use.

    The transport's own object is not a whole socket, and differs between event loops.
    """
    given = connection.transport.get_extra_info("socket")
    return socket.socket(fileno=os.dup(given.fileno()))
