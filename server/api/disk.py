"""The registry's disk, as routes use it: off the event loop, in threads that nobody else needs."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar, TypeVarTuple

from anyio import CancelScope, CapacityLimiter, to_thread

from interventions.registry import Registry, StagedUpload

# Where the disk hangs, these hang, and not those that parse large requests and render metrics.
THREADS: Final = 8

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class RegistryDisk:
    """Runs what waits for the registry's disk, a few calls at a time."""

    def __init__(self, threads: int = THREADS) -> None:
        """Allow so many calls at once; further ones wait for their turn, without a thread."""
        self._limiter = CapacityLimiter(threads)

    async def call(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function in a thread; returns and raises what it does."""
        return await to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def end(self, function: Callable[[], object]) -> None:
        """The same for what must be done even where the request is cancelled."""
        with CancelScope(shield=True):
            await self.call(function)

    @asynccontextmanager
    async def staged(self, registry: Registry) -> AsyncIterator[StagedUpload]:
        """A temporary file for an upload, gone after the block unless it was committed."""
        staged = await self.call(registry.stage)
        try:
            yield staged
        finally:
            await self.end(staged.discard)
