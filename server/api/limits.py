"""Limits on a request's body, its bytes and its time, in plain ASGI, before anything is parsed.

A body that is still coming when the server stops is not waited for.
"""

import asyncio
import math
import re
import time
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Allowance:
    """What a body may take."""

    size: int  # bytes
    pause: float  # seconds without a byte of it
    seconds: float  # for all of it, from the request's arrival
    rate: float  # bytes that each lengthen that by a second's share; infinite where none does

    def time_left(self, arrived: float, received: int) -> float:
        """Seconds that its next bytes may take; negative where its time is over."""
        end = arrived + self.seconds + received / self.rate
        return min(self.pause, end - time.monotonic())


class BodyLimitMiddleware:
    """Refuses a body that is too large by its Content-Length or by its bytes, or too slow.

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
        allowance = self._allowance(scope)
        try:
            _check_length(scope, allowance.size)
        except ApiError as error:
            scope["state"]["error_code"] = error.code  # for the request's record
            # To read a body that its client asks for before it sends it would be to ask for it.
            if not _waits_to_send(scope):
                await _drain(receive, DRAIN_SECONDS)
            await error.response(scope, receive, send)
            return
        body = _LimitedBody(receive, allowance, self._lifecycle)
        await self._app(scope, body.receive, send)

    def _allowance(self, scope: Scope) -> _Allowance:
        settings = self._settings
        pause = settings.body_timeout
        if scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            # An artifact may take long on a slow line, so that what counts is its pace.
            size = settings.max_artifact_bytes + MULTIPART_OVERHEAD
            return _Allowance(size, pause, pause, settings.min_upload_rate)
        return _Allowance(settings.max_body_bytes, pause, settings.request_timeout, math.inf)


class _LimitedBody:
    """Passes on a request's messages while its body stays within the limits."""

    def __init__(self, receive: Receive, allowance: _Allowance, lifecycle: Lifecycle) -> None:
        self._receive = receive
        self._allowance = allowance
        self._lifecycle = lifecycle
        self._arrived = time.monotonic()
        self._received = 0
        self._begun = False
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ApiError: the body is too large (413) or too slow (408), or the server stops (503).
        """
        if self._complete:
            return await self._receive()  # waits for the disconnect, as long as it takes
        message = await self._next()
        self._begun = True
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._received > self._allowance.size:
                if not self._complete:
                    await _drain(self._receive, DRAIN_SECONDS)
                raise _too_large(self._allowance.size)
        return message

    async def _next(self) -> Message:
        timeout = self._allowance.time_left(self._arrived, self._received)
        if timeout <= 0:  # even if something has come: it is how a body trickles in
            raise _too_slow(self._allowance)
        receiving = asyncio.ensure_future(self._receive())
        stopping = asyncio.ensure_future(self._lifecycle.until_stopping())
        try:
            await asyncio.wait(
                (receiving, stopping), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            # A body that comes fast must not hold the server either, once part of it is here.
            if receiving.done() and not (self._begun and self._lifecycle.stopping):
                return receiving.result()
        finally:
            await cancel(receiving, stopping)
        if self._lifecycle.stopping:
            await _drain(self._receive, LAST_DRAIN_SECONDS)
            raise shutting_down()
        raise _too_slow(self._allowance)


def _waits_to_send(scope: Scope) -> bool:
    """Whether the client sends its body only once it is told to."""
    return any(
        name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"]
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


def _too_slow(allowance: _Allowance) -> ApiError:
    limit = (
        f"{allowance.seconds:g} s after the request's arrival"
        if math.isinf(allowance.rate)
        else f"{allowance.seconds:g} s after its arrival at {allowance.rate:,} bytes a second"
    )
    return ApiError(
        408,
        f"The request's body was too slow: it may pause for {allowance.pause:g} s, and must be "
        f"here {limit}.",
        code="body_timeout",
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
