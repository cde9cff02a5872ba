"""Runs work that computes with torch on a thread that ends with the work.

Each thread that computes keeps an OpenMP pool of helper threads for as long as it lives. If there
are more helpers than processors, the engine's helpers no longer spin until their next operation,
and a decode step on two cores takes twice as long. So no computing thread but the engine's may stay
alive.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(function: Callable[[], T]) -> Future[T]:
    """Run a function on a new thread; the future gets its result or exception."""
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
