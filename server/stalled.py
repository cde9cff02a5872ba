"""Cuts off connections whose client reads nothing of what is sent."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("uvicorn.error")


class Connection(Protocol):
    """The part of uvicorn's protocol classes that is used here."""

    transport: asyncio.Transport


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

    def cut(self, connections: Iterable[Connection], now: float) -> None:
        """Look at all connections, and abort those that have stalled; to be called often.

        Args:
            now: the time in seconds, by any monotonic clock.
        """
        unsent: dict[asyncio.Transport, _Unsent] = {}
        for connection in connections:
            transport = connection.transport
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
