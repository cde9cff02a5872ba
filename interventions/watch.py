"""Watching a registry that other servers change, for as long as a server runs."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from interventions.leases import BEAT_SECONDS
from interventions.registry import Registry

LOOK_SECONDS: Final = 1.0  # between two looks: what others change is served before two have passed

_logger = logging.getLogger(__name__)


@contextmanager
def watched(
    registry: Registry, look_seconds: float = LOOK_SECONDS, beat_seconds: float = BEAT_SECONDS
) -> Iterator[None]:
    """Looks at a registry's folder and renews the registry's lease, within the block.

    Args:
        registry: is open until the block has ended.
        look_seconds: between two looks.
        beat_seconds: between two renewals, at least; they come after a look.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch,
        args=(registry, ended, look_seconds, beat_seconds),
        name="registry",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # A look that hangs with its disk must not keep the server from ending.
        thread.join(LOOK_SECONDS)


def _watch(
    registry: Registry, ended: threading.Event, look_seconds: float, beat_seconds: float
) -> None:
    last_beat = time.monotonic()
    while not ended.wait(look_seconds):
        _try(registry.look)
        if time.monotonic() - last_beat >= beat_seconds:
            last_beat = time.monotonic()
            _try(registry.beat)  # whatever the look came to: others count on it


def _try(watch: Callable[[], None]) -> None:
    try:
        watch()
    except Exception:
        _logger.exception("the registry's folder could not be watched")
