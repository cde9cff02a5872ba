"""Closes connections whose client sends no request, and cuts off those that read no answer."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("uvicorn.error")


class Cycle(Protocol):
    """A request and its answer, as uvicorn's h11 protocol keeps them."""

    @property
    def response_complete(self) -> bool:
        """True once the whole answer was written."""


class Connection(Protocol):
    """The part of uvicorn's h11 protocol that is used here."""

    @property
    def transport(self) -> asyncio.Transport:
        """The connection's transport."""

    @property
    def cycle(self) -> Cycle | None:
        """The current request, or else the last one; None until a request's head was read."""

    @property
    def between_requests(self) -> bool:
        """True if a request was answered and no byte of a further one has come."""


@dataclass(frozen=True, slots=True)
class _Idle:
    after: Cycle | None  # the last request
    between_requests: bool
    since: float  # seconds, by the clock of `close`


class IdleConnections:
    """Closes connections that for `timeout` seconds have sent no request, or only part of one.

    Between an answer and the first byte of the next request, the limit is `keep_alive` seconds.
    Uvicorn itself closes idle connections only in that state.
    """

    def __init__(self, timeout: float, keep_alive: float) -> None:
        self._timeout = timeout
        self._keep_alive = keep_alive
        self._idle: Mapping[Connection, _Idle] = {}

    def close(self, connections: Iterable[Connection], now: float) -> None:
        """Close the connections that were idle too long; to be called often.

        Args:
            now: the time in seconds, by any monotonic clock.
        """
        idle: dict[Connection, _Idle] = {}
        for connection in connections:
            cycle = connection.cycle
            answering = cycle is not None and not cycle.response_complete
            if answering or connection.transport.get_write_buffer_size():
                continue
            resting = connection.between_requests
            before = self._idle.get(connection)
            # A whole request may have come and been answered since the last call.
            if before is None or before.after is not cycle or before.between_requests != resting:
                before = _Idle(cycle, resting, now)
            idle[connection] = before
            if now - before.since > (self._keep_alive if resting else self._timeout):
                connection.transport.close()
        self._idle = idle


@dataclass(frozen=True, slots=True)
class _Unsent:
    size: int  # bytes waiting in the process
    since: float  # when the size last changed, in seconds, by the clock of `cut`


class StalledConnections:
    """Aborts connections that have had bytes to send, and could send none, for `timeout` seconds.

    A stream waits for its client, however slow, and closing a connection waits until all written
    bytes are sent. A client that reads nothing would hold the connection, and all that the stream
    holds, for ever.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._unsent: dict[asyncio.Transport, _Unsent] = {}

    def cut(self, transports: Iterable[asyncio.Transport], now: float) -> None:
        """Abort the connections that have stalled; to be called often.

        Args:
            now: the time in seconds, by any monotonic clock.
        """
        unsent: dict[asyncio.Transport, _Unsent] = {}
        for transport in transports:
            size = transport.get_write_buffer_size()
            if size == 0:
                continue
            # A write makes the buffer larger, and a reading client makes it smaller.
            before = self._unsent.get(transport)
            if before is None or before.size != size:
                before = _Unsent(size, now)
            unsent[transport] = before
        self._unsent = unsent
        for transport, state in unsent.items():
            if now - state.since > self._timeout:
                logger.warning("Cutting off a client that has read nothing for %g s", self._timeout)
                transport.abort()
