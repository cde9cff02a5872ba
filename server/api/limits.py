"""Limits the size and the time of a request's body, in plain ASGI, before anything is parsed.

A request whose body is incomplete when the server stops is refused.
"""

import asyncio
import math
import re
import time
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.context import Lifecycle
from server.api.errors import ApiError, invalid, shutting_down, too_large
from server.api.waiting import cancel
from server.config import Settings

UPLOAD_PATH: Final = "/v1/interventions"
MULTIPART_OVERHEAD: Final = 64 * 1024  # boundaries, part headers and the name beside the file
DRAIN_SECONDS: Final = 2.0  # time to read and drop the rest of a refused body
LAST_DRAIN_SECONDS: Final = 0.2  # the same while the server stops


@dataclass(frozen=True, slots=True)
class _BodyLimits:
    size: int  # bytes
    pause: float  # seconds without a byte
    seconds: float  # for the whole body, from the request's arrival
    rate: float  # bytes that extend `seconds` by one second; infinite if no byte extends it

    def time_left(self, arrived: float, received: int) -> float:
        """Return the seconds that the next bytes may take; negative if the time is over."""
        end = arrived + self.seconds + received / self.rate
        return min(self.pause, end - time.monotonic())


class BodyLimitMiddleware:
    """Refuses a body that is too large, too slow, or incomplete when the server stops.

    The size is judged by the Content-Length, which must be a number, and by the bytes that come.
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
            # If the client waits for `100 Continue`, to read the body would be to ask for it.
            if not _expects_continue(scope):
                await _drain(receive, DRAIN_SECONDS)
            await error.response(scope, receive, send)
            return
        body = _LimitedBody(receive, allowance, self._lifecycle)
        await self._app(scope, body.receive, send)

    def _allowance(self, scope: Scope) -> _BodyLimits:
        settings = self._settings
        pause = settings.body_timeout
        if scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            # An artifact may take long on a slow line, so its rate is limited from below instead.
            size = settings.max_artifact_bytes + MULTIPART_OVERHEAD
            return _BodyLimits(size, pause, pause, settings.min_upload_rate)
        return _BodyLimits(settings.max_body_bytes, pause, settings.request_timeout, math.inf)


class _LimitedBody:
    """Passes on a request's messages while its body stays within the limits."""

    def __init__(self, receive: Receive, allowance: _BodyLimits, lifecycle: Lifecycle) -> None:
        self._receive = receive
        self._allowance = allowance
        self._lifecycle = lifecycle
        self._arrived = time.monotonic()
        self._received = 0
        self._begun = False
        self._complete = False

    async def receive(self) -> Message:
        """Return the next message.

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
                raise too_large("request's body", self._allowance.size)
        return message

    async def _next(self) -> Message:
        timeout = self._allowance.time_left(self._arrived, self._received)
        if timeout <= 0:  # even if a message has come: a body may trickle in for ever
            raise _too_slow(self._allowance)
        receiving = asyncio.ensure_future(self._receive())
        stopping = asyncio.ensure_future(self._lifecycle.until_stopping())
        try:
            await asyncio.wait(
                (receiving, stopping), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            # Once the first part is here, even a body that comes fast must not delay the stop.
            if receiving.done() and not (self._begun and self._lifecycle.stopping):
                return receiving.result()
        finally:
            await cancel(receiving, stopping)
        if self._lifecycle.stopping:
            await _drain(self._receive, LAST_DRAIN_SECONDS)
            raise shutting_down()
        raise _too_slow(self._allowance)


def _expects_continue(scope: Scope) -> bool:
    """Tell whether the client sends its body only after `100 Continue`."""
    return any(
        name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"]
    )


def _check_length(scope: Scope, limit: int) -> None:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    for length in lengths:
        if not re.fullmatch(rb"[0-9]{1,18}", length):
            raise invalid("The Content-Length header is not a number.", None)
        if int(length) > limit:
            raise too_large("request's body", limit)


def _too_slow(allowance: _BodyLimits) -> ApiError:
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
    """Read and drop the rest of a body, for at most `seconds`.

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
