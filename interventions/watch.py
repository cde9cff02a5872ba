"""Watching a registry that other servers change, for as long as a server runs."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from interventions.leases import BEAT_SECONDS
from interventions.registry import Registry

LOOK_SECONDS: Final = 1.0  # between two looks: what others change is served before two have passed

_logger = logging.getLogger(__name__)


@contextmanager
def watched(registry: Registry) -> Iterator[None]:
    """Looks at a registry's folder and renews the registry's lease, within the block."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(registry, ended), name="registry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # A look that hangs with its disk must not keep the server from ending.
        thread.join(LOOK_SECONDS)


def _watch(registry: Registry, ended: threading.Event) -> None:
    last_beat = time.monotonic()
    while not ended.wait(LOOK_SECONDS):
        try:
            registry.look()
            if time.monotonic() - last_beat >= BEAT_SECONDS:
                last_beat = time.monotonic()
                registry.beat()
        except Exception:
            _logger.exception("the registry's folder could not be looked at")
