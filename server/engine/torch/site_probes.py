"""Hooks sites, and probes whether an edit at each of them reaches the logits.

A probe occupies the engine thread, so the sites of an artifact are probed a few at a time, with
steps in between: other requests wait for one such piece at most.
"""

import time
from collections.abc import Callable, Collection
from typing import Final

from steering.hooks import SteeringHooks

_MOST_OF: Final = 0.8  # share of a piece's allowed time; a piece that takes less lets the next grow


class SiteProbes:
    """Remembers which sites were probed, and what was found. Used on the engine thread only.

    `probe` takes hooked sites and returns those at which an edit does not reach the logits.
    """

    def __init__(
        self,
        hooks: SteeringHooks,
        probe: Callable[[frozenset[str]], frozenset[str]],
        max_at_once: int,
    ) -> None:
        """`max_at_once` bounds the sites that are probed in one piece."""
        self._hooks = hooks
        self._probe = probe
        self._max_at_once = max_at_once
        self._at_once = 1  # sites in the next piece, adapted to how long earlier pieces took
        self._probed: set[str] = set()
        self._dead: set[str] = set()

    def unprobed(self, sites: Collection[str]) -> list[str]:
        """Return the sites that have not been probed yet, sorted."""
        return sorted(set(sites) - self._probed)

    def dead(self, sites: Collection[str]) -> list[str]:
        """Return the sites at which a probe has shown that no edit reaches the logits, sorted."""
        return sorted(self._dead.intersection(sites))

    def probe_all(self, sites: Collection[str]) -> None:
        """Probe all sites that have not been probed yet, however long it takes."""
        self._hook_and_probe(self.unprobed(sites))

    def probe_some(self, sites: Collection[str], seconds: float) -> list[str]:
        """Probe at least one site that has not been probed, and as many as take about `seconds`.

        The number is adapted to how long earlier pieces took.

        Returns:
            The sites that were probed; empty if none was left.
        """
        some = self.unprobed(sites)[: self._at_once]
        began = time.perf_counter()
        self._hook_and_probe(some)
        took = time.perf_counter() - began
        if took > seconds:
            self._at_once = max(1, len(some) // 2)
        elif took < _MOST_OF * seconds:
            self._at_once = min(self._max_at_once, max(self._at_once, 2 * len(some)))
        return some

    def _hook_and_probe(self, sites: list[str]) -> None:
        for site in sites:
            self._hooks.install(site)
        # A probe that raises has shown nothing, so its sites still count as not probed.
        if sites:
            self._dead |= self._probe(frozenset(sites))
            self._probed.update(sites)
