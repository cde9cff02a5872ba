"""Closes connections whose client sends no request, and cuts off those that read no answer."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
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


class IdleConnections:
    """Closes connections that for `timeout` seconds have sent no request, or only part of one.

    Between an answer and the first byte of the next request, the limit is `keep_alive` seconds.
    Uvicorn itself closes idle connections only in that state.
    """

    def __init__(self, timeout: float, keep_alive: float) -> None:
        self._timeout = timeout
        self._keep_alive = keep_alive
        # For each idle connection: its last request, whether that was answered and no byte of a
        # further one has come, and since when, by the clock of `close`.
        self._idle: Mapping[Connection, tuple[Cycle | None, bool, float]] = {}

    def close(self, connections: Iterable[Connection], now: float) -> None:
        """Close the connections that were idle too long; to be called often.

        Args:
            now: the time in seconds, by any monotonic clock.
        """
        idle: dict[Connection, tuple[Cycle | None, bool, float]] = {}
        for connection in connections:
            cycle = connection.cycle
            answering = cycle is not None and not cycle.response_complete
            if answering or connection.transport.get_write_buffer_size():
                continue
            resting = connection.between_requests
            last, rested, since = self._idle.get(connection, (None, False, now))
            # A whole request may have come and been answered since the last call.
            if last is not cycle or rested != resting:
                since = now
            idle[connection] = cycle, resting, since
            if now - since > (self._keep_alive if resting else self._timeout):
                connection.transport.close()
        self._idle = idle


class StalledConnections:
    """Aborts connections that have had bytes to send, and could send none, for `timeout` seconds.

    A stream waits for its client, however slow, and closing a connection waits until all written
    bytes are sent. A client that reads nothing would hold the connection, and all that the stream
    holds, for ever.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        # The bytes that wait in the process, and since when their number is the same.
        self._unsent: dict[asyncio.Transport, tuple[int, float]] = {}

    def cut(self, transports: Iterable[asyncio.Transport], now: float) -> None:
        """Abort the connections that have stalled; to be called often.

        Args:
            now: the time in seconds, by any monotonic clock.
        """
        unsent: dict[asyncio.Transport, tuple[int, float]] = {}
        for transport in transports:
            size = transport.get_write_buffer_size()
            if size == 0:
                continue
            # A write makes the buffer larger, and a reading client makes it smaller.
            before, since = self._unsent.get(transport, (size, now))
            unsent[transport] = size, since if before == size else now
        self._unsent = unsent
        for transport, (_, since) in unsent.items():
            if now - since > self._timeout:
                logger.warning("Cutting off a client that has read nothing for %g s", self._timeout)
                transport.abort()
