"""The end of listening: whoever has connected by then is answered."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import closing, suppress


async def stop_listening(
    servers: Iterable[asyncio.Server], protocol: Callable[[], asyncio.Protocol]
) -> None:
    """Close the listening sockets, and serve the connections that wait there to be accepted.

    The system completes a connection before the process accepts it, and resets it when the
    listening socket is closed. Its client may have sent a request by then, and could not tell
    whether it was begun; one that connects later is refused, and knows that it was not.

    Args:
        protocol: makes what serves one connection.
    """
    waiting = [connection for server in servers for connection in _close(server)]
    loop = asyncio.get_running_loop()
    for connection in waiting:
        with suppress(OSError):  # its client has left
            await loop.connect_accepted_socket(protocol, connection)


def _close(server: asyncio.Server) -> list[socket.socket]:
    """Close a server's listening sockets; returns the connections that waited there."""
    copies = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
    server.close()  # the copies still listen
    waiting: list[socket.socket] = []
    for copy in copies:
        with closing(copy), suppress(OSError):  # none waits any more
            copy.setblocking(False)
            while True:
                waiting.append(copy.accept()[0])
    return waiting
