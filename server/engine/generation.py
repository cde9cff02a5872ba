"""The outputs of one admitted request, on the asyncio side."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from server.engine.errors import EngineError
from server.engine.output import StepOutput
from server.engine.request import Request


class DeliveredGeneration:
    """Yields what the engine thread delivers. Used on the event loop only."""

    def __init__(
        self,
        cancel: Callable[[], None],
        follow: Callable[[Request], Awaitable["DeliveredGeneration"]],
        request: Request,
    ) -> None:
        self._cancel = cancel
        self._follow = follow
        # True until the follower has taken the reserved queue place, or it was given up.
        self._holds_place = request.has_follower
        self._outputs: asyncio.Queue[StepOutput | EngineError] = asyncio.Queue()
        self.ended = False  # nothing more will be delivered

    def deliver(self, output: StepOutput | EngineError) -> None:
        """Add an output. Outputs after an error or a finish reason are ignored."""
        if not self.ended:
            self.ended = isinstance(output, EngineError) or output.finish_reason is not None
            self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yield outputs until one carries a finish reason; raise EngineError on failure."""
        while not (self.ended and self._outputs.empty()):
            output = await self._outputs.get()
            if isinstance(output, EngineError):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    async def follow(self, request: Request) -> "DeliveredGeneration":
        """Admit one more request; see server.engine.base.Generation.follow."""
        if not self._holds_place:
            raise EngineError("no place is held for a request that follows this one")
        generation = await self._follow(request)
        self._holds_place = False
        return generation

    def cancel(self) -> None:
        """Stop generating, and free what is held; see server.engine.base.Generation.cancel."""
        if self.ended and not self._holds_place:
            return
        self._holds_place = False
        self.deliver(EngineError("the request was cancelled"))
        self._cancel()
