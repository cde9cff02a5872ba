"""Polls a registry that other servers change, for as long as a server runs."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from interventions.leases import HEARTBEAT_SECONDS
from interventions.registry import Registry

POLL_SECONDS: Final = 1.0  # between two polls

_logger = logging.getLogger(__name__)


@contextmanager
def polling(
    registry: Registry,
    poll_seconds: float = POLL_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Iterator[None]:
    """Poll a registry and renew its lease from a thread, during the block.

    Args:
        registry: a registry that stays open during the block.
        poll_seconds: seconds between two polls.
        heartbeat_seconds: least seconds between two heartbeats, each of which follows a poll.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch,
        args=(registry, ended, poll_seconds, heartbeat_seconds),
        name="registry",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # A poll that hangs with its disk must not keep the server from ending.
        thread.join(POLL_SECONDS)


def _watch(
    registry: Registry, ended: threading.Event, poll_seconds: float, heartbeat_seconds: float
) -> None:
    last_beat = time.monotonic()
    while not ended.wait(poll_seconds):
        _log_errors(registry.poll)
        if time.monotonic() - last_beat >= heartbeat_seconds:
            last_beat = time.monotonic()
            _log_errors(registry.heartbeat)  # even if the poll failed: other servers rely on it


def _log_errors(watch: Callable[[], None]) -> None:
    try:
        watch()
    except Exception:
        _logger.exception("the registry's folder could not be watched")
