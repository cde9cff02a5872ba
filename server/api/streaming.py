"""Streams a completion as server-sent events, and handles everything that may end it early."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError, ClientGoneError, as_api_error, internal_error
from server.api.frames import Choice, Frame
from server.api.generations import GenerationGroup
from server.api.observe import outcome_of, set_outcome
from server.api.waiting import unless_client_leaves
from server.engine.errors import EngineError
from server.engine.output import StepOutput

logger = logging.getLogger(__name__)


class CompletionStream(Response):
    """Streams a group's choices as they are generated, and closes the group in any case.

    An error after the first byte is an event of its own, after which the stream ends. It also ends
    if the client closes the connection. The connection of a client that stops reading is closed
    from outside, by `server.connections`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        group: GenerationGroup,
        frame: Frame,
        choices: Sequence[Choice],
        compared: Sequence[Choice],
        *,
        conclude: Callable[[], Awaitable[Mapping[str, JsonValue]]],
    ) -> None:
        """Stream `choices`; `compared`, the base model's, are only collected.

        `conclude` returns the answer's further fields, once all choices have finished.
        """
        # A proxy that buffers or caches would hold the tokens back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._group = group
        self._frame = frame
        self._choices = choices
        self._compared = compared
        self._conclude = conclude

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._stream(send))
        except (ClientGoneError, OSError):
            return  # the client is gone, and the answer stays incomplete
        except (ApiError, EngineError) as error:
            await self._fail(as_api_error(error), scope, send)
        except Exception:
            logger.exception("A stream failed")
            await self._fail(internal_error(), scope, send)
        finally:
            self._group.close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)

        async def deliver(index: int, output: StepOutput) -> None:
            if index >= len(self._choices):
                self._compared[index - len(self._choices)].add(output)
                return
            for part in self._choices[index].deltas(output):
                shared = {} if index else self._choices[0].shared()
                await _send(self._frame.part(part, self._group.usage, shared), send)

        await self._group.run(deliver)
        further = await self._conclude()
        await _send(self._frame.closing(self._group.usage, further), send, last=True)

    async def _fail(self, error: ApiError, scope: Scope, send: Send) -> None:
        request = Request(scope)
        set_outcome(request, outcome_of(error.status))
        request.state.error_code = error.code
        with suppress(OSError):
            await _send(self._frame.failure(error), send, last=True)


async def _send(body: bytes, send: Send, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})
