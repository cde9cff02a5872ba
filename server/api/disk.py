"""Runs the routes' calls to the registry's disk in threads, apart from all other work."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar, TypeVarTuple

from anyio import CancelScope, CapacityLimiter, to_thread

from interventions.registry import Registry
from interventions.staged_upload import StagedUpload

# If the disk hangs, these threads hang, and not those that parse large requests or render metrics.
THREADS: Final = 8

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class RegistryDisk:
    """Runs calls that wait for the registry's disk in threads, a few at a time."""

    def __init__(self, threads: int = THREADS) -> None:
        """Allow `threads` calls at once; further calls wait for their turn without a thread."""
        self._limiter = CapacityLimiter(threads)

    async def call(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function in a thread and return its result."""
        return await to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def end(self, function: Callable[[], object]) -> None:
        """Call a function in a thread even if the request is cancelled, for clean-up."""
        with CancelScope(shield=True):
            await self.call(function)

    @asynccontextmanager
    async def staged(self, registry: Registry) -> AsyncIterator[StagedUpload]:
        """Provide a temporary file for an upload, deleted after the block unless committed."""
        staged = await self.call(registry.stage)
        try:
            yield staged
        finally:
            await self.end(staged.discard)
