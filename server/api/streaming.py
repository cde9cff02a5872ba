"""A completion as server-sent events, and everything that may end it early."""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError, ClientGoneError, from_engine, internal_error
from server.api.frames import Choice, Frame
from server.api.generations import GenerationGroup, unless_client_leaves
from server.api.observe import outcome_of, set_outcome
from server.engine.base import EngineError, StepOutput

DONE: Final = b"data: [DONE]\n\n"

logger = logging.getLogger(__name__)


class CompletionStream(Response):
    """Streams a group's choices as they are generated, and closes the group whatever happens.

    An error after the first byte is an event of its own, after which the stream ends without
    `[DONE]`. A client that goes away, or reads nothing for `write_timeout` seconds, ends it too.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        group: GenerationGroup,
        frame: Frame,
        choices: Sequence[Choice],
        *,
        include_usage: bool,
        write_timeout: float,
    ) -> None:
        # A proxy that buffers or caches would hold the tokens back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._group = group
        self._frame = frame
        self._choices = choices
        self._include_usage = include_usage
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to the end, to an error, or until the client is gone."""
        try:
            await unless_client_leaves(receive, self._stream(send))
        except (ClientGoneError, TimeoutError, OSError):
            return  # nobody reads any more; the answer stays incomplete
        except ApiError as error:
            await self._fail(error, scope, send)
        except EngineError as error:
            await self._fail(from_engine(error), scope, send)
        except Exception:
            logger.exception("A stream failed")
            await self._fail(internal_error(), scope, send)
        finally:
            self._group.close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)

        async def deliver(index: int, output: StepOutput) -> None:
            for choice in self._choices[index].deltas(output):
                chunk = self._frame.chunk(choice, usage_follows=self._include_usage)
                await self._send(_event(chunk), send)

        await self._group.run(deliver)
        if self._include_usage:
            await self._send(_event(self._frame.usage_chunk(self._group.usage)), send)
        await self._send(DONE, send, last=True)

    async def _fail(self, error: ApiError, scope: Scope, send: Send) -> None:
        set_outcome(Request(scope), outcome_of(error.status))
        try:
            await self._send(_event(error.body), send, last=True)
        except (TimeoutError, OSError):
            return

    async def _send(self, body: bytes, send: Send, *, last: bool = False) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": not last}
        async with asyncio.timeout(self._write_timeout):
            await send(message)


def _event(body: Mapping[str, JsonValue]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
