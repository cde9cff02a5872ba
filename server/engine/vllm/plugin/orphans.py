"""Ends vLLM's processes where the server is gone. They would keep the device's memory."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import psutil

SERVER_VARIABLE: Final = "_STEERSERVE_SERVER_PID"
_PERIOD: Final = 1.0  # seconds


def end_with_server() -> None:
    """Start a thread that ends this worker, and vLLM's scheduler, once the server has ended.

    vLLM's scheduler outlives a server that is killed, and its workers outlive neither. A worker
    that the server's machine did not start, by Ray for example, is left to what started it.
    """
    server = int(os.environ.get(SERVER_VARIABLE, "0"))
    parents = psutil.Process().parents()
    for index, parent in enumerate(parents):
        if parent.pid == server:
            arguments = (parent, parents[:index])
            threading.Thread(target=_end_after, args=arguments, name="orphans", daemon=True).start()


def _end_after(server: psutil.Process, between: Sequence[psutil.Process]) -> None:
    while _is_alive(server):
        time.sleep(_PERIOD)
    for process in between:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs. It no longer does while its own parent has yet to reap it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
