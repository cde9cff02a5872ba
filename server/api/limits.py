"""Limits on a request's body, in plain ASGI: they hold before anything is parsed."""

import asyncio
import re
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, invalid
from server.config import Settings

UPLOAD_PATH: Final = "/v1/interventions"
MULTIPART_OVERHEAD: Final = 64 * 1024  # boundaries, part headers and the name beside the file
DRAIN_SECONDS: Final = 2.0


class BodyLimitMiddleware:
    """Refuses a body that is too large by its Content-Length or by its bytes, or that stalls."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        try:
            _check_length(scope, limit)
        except ApiError as error:
            await _drain(receive)
            await error.response(scope, receive, send)
            return
        body = _LimitedBody(receive, limit, self._settings.body_timeout)
        await self._app(scope, body.receive, send)

    def _limit(self, scope: Scope) -> int:
        if scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            return self._settings.max_artifact_bytes + MULTIPART_OVERHEAD
        return self._settings.max_body_bytes


class _LimitedBody:
    """Passes on a request's messages while its body stays within the limits."""

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._received = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ApiError: the body is too large (413) or stalls (408).
        """
        if self._complete:
            return await self._receive()  # waits for the disconnect, as long as it takes
        try:
            message = await asyncio.wait_for(self._receive(), self._timeout)
        except TimeoutError:
            raise ApiError(
                408,
                f"Nothing of the request's body came for {self._timeout:g} s.",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._received > self._limit:
                if not self._complete:
                    await _drain(self._receive)
                raise _too_large(self._limit)
        return message


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


async def _drain(receive: Receive) -> None:
    """Drop what is still being sent, for a moment.

    A client that writes its whole body before it reads would otherwise meet a closed connection
    instead of the answer.
    """
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
