"""Work that computes with torch, on a thread that ends with it.

Each thread that computes keeps helpers of its own for as long as it lives (OpenMP's pools). Where
there are more of them than processors, those of the engine no longer wait awake for their next
operation, and a decode step on two cores takes twice as long. So only the engine's thread computes
and stays.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(function: Callable[[], T]) -> Future[T]:
    """Start a function; its result or exception comes by the future."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=getattr(function, "__name__", "work"), daemon=True).start()
    return future
