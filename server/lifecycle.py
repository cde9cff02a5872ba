"""Runs the server's process: serves, drains after a signal, and stops when the engine dies."""

import asyncio
import logging
import math
import os
import socket
import time
from contextlib import suppress
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from server.api.context import ServerContext
from server.connections import IdleConnections, StalledConnections
from server.framing import ServerState
from server.listening import stop_listening
from server.protocol import HttpProtocol

# Seconds for the error answers of ended requests to reach their clients.
_FINAL_ERRORS_SECONDS: Final = 5
_TICK_SECONDS: Final = 0.1

logger = logging.getLogger("uvicorn.error")


class Server(uvicorn.Server):
    """Uvicorn's server, which drains after a signal, and stops when the engine dies.

    After the first SIGTERM or SIGINT, running and waiting requests may go on for `shutdown_timeout`
    seconds; then the engine is closed, which ends them with an error. An open connection is served
    until it has been idle for `shutdown_keep_alive` seconds. A second signal ends the process at
    once. If the engine is stuck in a step, the process ends once all requests are answered.
    """

    server_state: ServerState

    def __init__(self, app: FastAPI) -> None:
        context = app.state.context
        assert isinstance(context, ServerContext)
        settings = context.settings
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            # h11 bounds a request's head, which comes before any key; httptools does not.
            http=HttpProtocol,
            # `IdleConnections` closes idle connections; this is a second safeguard.
            timeout_keep_alive=math.ceil(settings.keep_alive),
            ws="none",
            log_level="info",
            access_log=False,
            log_config=None,  # `configure_logging` was called before
            # Ends requests that outlive the closed engine, such as uploads.
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + _FINAL_ERRORS_SECONDS,
        )
        super().__init__(config)
        self.server_state = ServerState()
        self.engine_died = False
        self._engine = context.engine
        self._scoring = context.scoring
        self._lifecycle = context.lifecycle
        self._drain_seconds = settings.shutdown_timeout
        self._last_idle_seconds = settings.shutdown_keep_alive
        self._stalled = StalledConnections(settings.write_timeout)
        self._idle = IdleConnections(settings.body_timeout, settings.keep_alive)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes or the engine dies."""
        watching = asyncio.create_task(self._watch_connections())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; at the second, exit at once with a shell's status for it."""
        # Uvicorn's own handler raises the signal again at the end, so that a clean stop looks like
        # a kill, and ignores a second SIGTERM.
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True  # uvicorn then calls `shutdown` at its next tick

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop serving; uvicorn calls this ten times a second."""
        if not self._engine.ready and not self._lifecycle.stopping:
            logger.critical("The engine has died; the server stops, to be started anew.")
            self.engine_died = True
            self._drain_seconds = 0
            self.config.timeout_graceful_shutdown = 1
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new requests, and end the others after `shutdown_timeout` seconds."""
        drained = asyncio.Event()
        closing = asyncio.create_task(self._close_engine(drained))
        await stop_listening(self.servers, self._protocol)
        await self._serve_last_requests()
        self._lifecycle.stop()
        await super().shutdown(sockets)
        drained.set()
        ended = await closing
        if self._engine.died and not self.engine_died:
            self.engine_died = True
            logger.critical("The engine has died while the server was stopping.")
        if not ended:
            logger.critical("The engine is stuck: the process ends without it.")
            os._exit(1)

    def _protocol(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self.lifespan.state)

    async def _serve_last_requests(self) -> None:
        """Serve requests on open connections until there are none, or the time is over.

        If a proxy's connection is closed while the proxy sends a request on it, the proxy cannot
        know whether the request was begun, and so cannot send it to another server.
        """
        if not self._last_idle_seconds:
            return
        logger.info("Draining: no further connections, and one more request on each open one")
        self.server_state.closes_connections = True
        self._idle = IdleConnections(self._last_idle_seconds, self._last_idle_seconds)
        began = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await self._until_no_connections()
        assert self.config.timeout_graceful_shutdown is not None
        self.config.timeout_graceful_shutdown -= math.floor(time.monotonic() - began)

    async def _until_no_connections(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)  # uvicorn registers an accepted connection later
            if not (self.server_state.connections and self._engine.ready):
                return

    async def _close_engine(self, drained: asyncio.Event) -> bool:
        try:
            async with asyncio.timeout(self._drain_seconds):
                await drained.wait()
        except TimeoutError:
            count = len(self.server_state.tasks)
            logger.warning("%g s are over: ending %d request(s)", self._drain_seconds, count)
        if self._scoring is not None:
            await self._scoring.close()  # ends requests that wait for a score
        return await self._engine.close()

    async def _watch_connections(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            connections = [
                each for each in self.server_state.connections if isinstance(each, HttpProtocol)
            ]
            now = time.monotonic()
            self._stalled.cut([each.transport for each in connections], now)
            self._idle.close(connections, now)
            for connection in connections:
                connection.close_if_reset()
