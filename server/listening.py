"""Stops listening without losing connections that clients have already opened."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import closing, suppress


async def stop_listening(
    servers: Iterable[asyncio.Server], protocol: Callable[[], asyncio.Protocol]
) -> None:
    """Close the listening sockets, and serve the connections that wait to be accepted.

    The system completes a connection before the process accepts it, and resets it when the
    listening socket is closed. A client that has sent a request by then could not tell whether the
    request was begun. A client that connects later is refused, and knows that it was not.

    Args:
        protocol: makes the protocol of one connection.
    """
    waiting = [connection for server in servers for connection in _close(server)]
    loop = asyncio.get_running_loop()
    for connection in waiting:
        with suppress(OSError):  # the client has left
            await loop.connect_accepted_socket(protocol, connection)


def _close(server: asyncio.Server) -> list[socket.socket]:
    """Close a server's listening sockets; return the connections that waited to be accepted."""
    copies = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
    server.close()  # the copies still listen
    waiting: list[socket.socket] = []
    for copy in copies:
        with closing(copy), suppress(OSError):  # `accept` raises once no connection waits
            copy.setblocking(False)
            while True:
                waiting.append(copy.accept()[0])
    return waiting
