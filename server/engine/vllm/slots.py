"""Loads interventions into slots of vLLM's workers, each once for all requests that wait for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from server.engine.errors import UnservableInterventionError
from server.engine.slots import SlotTable

logger = logging.getLogger(__name__)


class WorkerSlots:
    """Tells which intervention holds which slot in every worker. Used on the event loop only.

    `call` calls a method of every worker by its name. vLLM's core takes calls, requests and
    cancellations in the order in which they are sent, so a slot is overwritten only after the last
    step of the requests that were unpinned before.
    """

    def __init__(
        self,
        capacity: int,
        call: Callable[[str, tuple[Any, ...]], Awaitable[object]],
        path: Callable[[str], Path],
    ) -> None:
        """`path` returns the file of an artifact that is stored and checked."""
        self.table = SlotTable(capacity)
        self._call = call
        self._path = path
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def pin(self, digest: str) -> int:
        """Pin an intervention, loading it if need be, and return its slot.

        Raises:
            BankFullError: every slot is pinned.
            UnservableInterventionError: it cannot be read, or the workers cannot take it.
        """
        slot = self.table.pin(digest)
        if slot is None:
            slot = self.table.take(digest)
            self._loads[digest] = asyncio.create_task(self._load(slot, digest))
        if (load := self._loads.get(digest)) is None:
            return slot
        try:
            await asyncio.shield(load)  # others may wait for it when this request is cancelled
        except asyncio.CancelledError:
            if not _has_failed(load):  # a load that fails removes all pins
                self.unpin(digest)
            raise
        return slot

    def unpin(self, digest: str) -> None:
        """Release one pin."""
        self.table.unpin(digest)

    async def _load(self, slot: int, digest: str) -> None:
        try:
            artifact = await asyncio.to_thread(self._path(digest).read_bytes)
            await self.load_bytes(slot, digest, artifact)
        except Exception as error:
            self.table.drop(digest)
            logger.warning("the intervention %s could not be loaded: %s", digest, error)
            raise UnservableInterventionError(
                f"The intervention cannot be loaded: {error}"
            ) from error
        except BaseException:
            self.table.drop(digest)
            raise
        finally:
            del self._loads[digest]

    async def load_bytes(self, slot: int, digest: str, artifact: bytes) -> None:
        """Fill a slot of every worker with an artifact's parameters."""
        await self._call("steering_load", (slot, digest, artifact))


def _has_failed(load: "asyncio.Task[None]") -> bool:
    return load.done() and (load.cancelled() or load.exception() is not None)
