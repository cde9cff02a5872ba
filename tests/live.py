"""Serves the application on a real socket, with the server class of `steerserve serve`."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import uvicorn
from fastapi import FastAPI

from server.lifecycle import Server
from tests.serving import eventually

SEND_BUFFER = 4096  # bytes; small, so that a slow reader soon blocks the server


@dataclass(frozen=True)
class LiveServer:
    """A server in this process, its task and its port."""

    server: Server
    task: asyncio.Task[None]
    port: int

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def live(app: FastAPI) -> AsyncIterator[LiveServer]:
    """Serve an application; stop it at the end if it has not stopped by itself."""
    with pytest.MonkeyPatch.context() as patch:
        # uvicorn's logging configuration would change the loggers of the whole test run.
        patch.setattr(uvicorn.Config, "configure_logging", lambda _: None)
        server = Server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await eventually(lambda: server.started or task.done())
        try:
            yield LiveServer(server, task, listener.getsockname()[1])
        finally:
            server.should_exit = True
            async with asyncio.timeout(20):
                await task
