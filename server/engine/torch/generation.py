"""One admitted request's outputs, on the asyncio side."""

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.base import EngineError, StepOutput


class TorchGeneration:
    """Yields what the engine thread delivers. Used on the event loop only."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
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

    def cancel(self) -> None:
        """Stop generating and free what the request holds. Harmless when it has finished."""
        if not self.ended:
            self.deliver(EngineError("the request was cancelled"))
            self._cancel()
