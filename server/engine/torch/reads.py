"""Reading interventions' parameters, off the engine thread and off the event loop."""

import asyncio
from collections.abc import Callable

from server.engine.base import UnservableInterventionError
from server.engine.torch.interventions import Parameters


class SharedReads:
    """Reads each intervention once, however many requests wait for it. Used on the event loop."""

    def __init__(self, source: Callable[[str], Parameters]) -> None:
        """`source` is called in a thread, with a digest."""
        self._source = source
        self._reads: dict[str, asyncio.Task[Parameters]] = {}

    async def read(self, digest: str) -> Parameters:
        """An intervention's parameters.

        Raises:
            UnservableInterventionError: they cannot be read.
        """
        if digest not in self._reads:
            self._reads[digest] = asyncio.create_task(asyncio.to_thread(self._source, digest))
            self._reads[digest].add_done_callback(lambda _: self._reads.pop(digest))
        try:
            # Whoever stops waiting leaves the read to the others.
            return await asyncio.shield(self._reads[digest])
        except (OSError, ValueError) as error:
            raise UnservableInterventionError(
                f"The intervention cannot be read: {error}"
            ) from error
