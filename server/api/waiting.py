"""Runs work that somebody waits for, and cancels it when nobody waits any more."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TypeVar

from starlette.types import Receive

from server.api.errors import ClientGoneError

T = TypeVar("T")


async def gather_or_cancel(work: Sequence[Coroutine[object, object, None]]) -> None:
    """Run coroutines concurrently. The first exception cancels the others and is raised as is."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel(*tasks)


async def unless_client_leaves(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Await the work unless the client leaves; the request's body must have been read before.

    Raises:
        ClientGoneError: the client closed the connection first; the work was cancelled.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError("The client closed the connection.")
        return worker.result()
    finally:
        await cancel(worker, watcher)


async def cancel(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    """Cancel unfinished tasks and wait for their end; results and exceptions are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
