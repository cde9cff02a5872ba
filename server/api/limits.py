"""Limits on a request's body, in plain ASGI: they hold before anything is parsed.

A body that is still coming when the server stops is not waited for.
"""

import asyncio
import re
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.context import Lifecycle
from server.api.errors import ApiError, invalid, shutting_down
from server.api.waiting import cancel
from server.config import Settings

UPLOAD_PATH: Final = "/v1/interventions"
MULTIPART_OVERHEAD: Final = 64 * 1024  # boundaries, part headers and the name beside the file
DRAIN_SECONDS: Final = 2.0
LAST_DRAIN_SECONDS: Final = 0.2  # the same when the server stops


class BodyLimitMiddleware:
    """Refuses a body that is too large by its Content-Length or by its bytes, or that stalls.

    Also one that is incomplete when the server stops.
    """

    def __init__(self, app: ASGIApp, settings: Settings, lifecycle: Lifecycle) -> None:
        self._app = app
        self._settings = settings
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        try:
            _check_length(scope, limit)
        except ApiError as error:
            await _drain(receive, DRAIN_SECONDS)
            await error.response(scope, receive, send)
            return
        body = _LimitedBody(receive, limit, self._settings.body_timeout, self._lifecycle)
        await self._app(scope, body.receive, send)

    def _limit(self, scope: Scope) -> int:
        if scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            return self._settings.max_artifact_bytes + MULTIPART_OVERHEAD
        return self._settings.max_body_bytes


class _LimitedBody:
    """Passes on a request's messages while its body stays within the limits."""

    def __init__(self, receive: Receive, limit: int, timeout: float, lifecycle: Lifecycle) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._lifecycle = lifecycle
        self._received = 0
        self._begun = False
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ApiError: the body is too large (413) or stalls (408), or the server stops (503).
        """
        if self._complete:
            return await self._receive()  # waits for the disconnect, as long as it takes
        message = await self._next()
        self._begun = True
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._received > self._limit:
                if not self._complete:
                    await _drain(self._receive, DRAIN_SECONDS)
                raise _too_large(self._limit)
        return message

    async def _next(self) -> Message:
        receiving = asyncio.ensure_future(self._receive())
        stopping = asyncio.ensure_future(self._lifecycle.until_stopping())
        try:
            await asyncio.wait(
                (receiving, stopping), timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED
            )
            # A body that comes fast must not hold the server either, once part of it is here.
            if receiving.done() and not (self._begun and self._lifecycle.stopping):
                return receiving.result()
        finally:
            await cancel(receiving, stopping)
        if self._lifecycle.stopping:
            await _drain(self._receive, LAST_DRAIN_SECONDS)
            raise shutting_down()
        raise ApiError(
            408,
            f"Nothing of the request's body came for {self._timeout:g} s.",
            code="body_timeout",
            headers={"Connection": "close"},
        )


def _check_length(scope: Scope, limit: int) -> None:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    for length in lengths:
        if not re.fullmatch(rb"[0-9]{1,18}", length):
            raise invalid("The Content-Length header is not a number.", None)
        if int(length) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request's body is larger than the {limit:,} bytes that the server takes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


async def _drain(receive: Receive, seconds: float) -> None:
    """Drop what is still being sent, for a moment.

    A client that writes its whole body before it reads would otherwise meet a closed connection
    instead of the answer.
    """
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
