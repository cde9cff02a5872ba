"""Reads interventions' parameters, off the engine thread and off the event loop."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

import torch

from server.engine.errors import UnservableInterventionError
from server.engine.torch.loaded_interventions import Parameters
from server.own_thread import in_own_thread


class SharedReads:
    """Reads each intervention once, however many requests wait for it. Used on the event loop."""

    def __init__(self, source: Callable[[str], Parameters]) -> None:
        """`source` reads the parameters of a digest; it is called in a thread of its own."""
        self._source = source
        self._reads: dict[str, asyncio.Future[Parameters]] = {}
        self._waiters: Counter[str] = Counter()

    @contextmanager
    def keeping(self, digests: Set[str]) -> Iterator[None]:
        """Within the context, keep what is read of these interventions for all who want it."""
        self._waiters.update(digests)
        try:
            yield
        finally:
            self._waiters.subtract(digests)
            for digest in digests:
                if not self._waiters[digest]:
                    del self._waiters[digest]
                    self._reads.pop(digest, None)

    async def read(self, digest: str) -> Parameters:
        """Return an intervention's parameters. Call it within a `keeping` context with the digest.

        Raises:
            UnservableInterventionError: they cannot be read.
        """
        if digest not in self._reads:
            self._reads[digest] = asyncio.wrap_future(in_own_thread(partial(self._source, digest)))
        try:
            # A waiter that is cancelled must not cancel the read for the others.
            return await asyncio.shield(self._reads[digest])
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            self._reads.pop(digest, None)  # so that the next request tries again
            raise UnservableInterventionError(
                f"The intervention cannot be read: {error}"
            ) from error
