"""One admitted request's outputs, on the asyncio side."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from server.engine.base import EngineError, Request, StepOutput


class TorchGeneration:
    """Yields what the engine thread delivers. Used on the event loop only."""

    def __init__(
        self,
        cancel: Callable[[], None],
        follow: Callable[[Request], Awaitable["TorchGeneration"]],
        request: Request,
    ) -> None:
        self._cancel = cancel
        self._follow = follow
        self._holds_place = request.followed  # until the follower has it, or nobody wants it
        self._outputs: asyncio.Queue[StepOutput | EngineError] = asyncio.Queue()
        self.ended = False  # nothing more will be delivered

    def deliver(self, output: StepOutput | EngineError) -> None:
        """Add what the engine computed; nothing comes after an error or a finish reason."""
        if not self.ended:
            self.ended = isinstance(output, EngineError) or output.finish_reason is not None
            self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yield outputs until one carries a finish reason; raise EngineError if it is lost."""
        while not (self.ended and self._outputs.empty()):
            output = await self._outputs.get()
            if isinstance(output, EngineError):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    async def follow(self, request: Request) -> "TorchGeneration":
        """Admit one more request; see server.engine.base.Generation.follow."""
        if not self._holds_place:
            raise EngineError("no place is held for a request that follows this one")
        generation = await self._follow(request)
        self._holds_place = False
        return generation

    def cancel(self) -> None:
        """Stop generating and free what is held; see server.engine.base.Generation.cancel."""
        if self.ended and not self._holds_place:
            return
        self._holds_place = False
        self.deliver(EngineError("the request was cancelled"))
        self._cancel()
