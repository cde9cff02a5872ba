"""Which sites are hooked, and at which of them a probe has shown that an edit reaches the logits.

A probe takes the engine thread, so the sites of an artifact are probed a few at a time, with steps
in between: nobody else waits for more than one such piece.
"""

import time
from collections.abc import Callable, Collection
from typing import Final

from steering.hooks import SteeringHooks

_FEW: Final = 0.8  # of the time that a piece may take: the next one may be larger


class SiteProbes:
    """Used on the engine thread only.

    `probe` is given hooked sites and returns those at which an edit does not reach the logits.
    """

    def __init__(
        self,
        hooks: SteeringHooks,
        probe: Callable[[frozenset[str]], frozenset[str]],
        most_at_once: int,
    ) -> None:
        """`most_at_once` bounds the sites that are probed in one piece."""
        self._hooks = hooks
        self._probe = probe
        self._most_at_once = most_at_once
        self._at_once = 1  # as many as took little enough time; the first piece is the smallest
        self._probed: set[str] = set()
        self._dead: set[str] = set()

    def left(self, sites: Collection[str]) -> list[str]:
        """Those that no probe has tried yet."""
        return sorted(set(sites) - self._probed)

    def dead(self, sites: Collection[str]) -> list[str]:
        """Those at which a probe has shown that an edit does not reach the logits."""
        return sorted(self._dead.intersection(sites))

    def probe_all(self, sites: Collection[str]) -> None:
        """Probe all that are left, however long it takes."""
        self._try(self.left(sites))

    def probe_some(self, sites: Collection[str], seconds: float) -> list[str]:
        """Probe at least one of those that are left, and as many as take about `seconds`.

        How many these are is told by how long earlier pieces took.

        Returns:
            Those that were probed; none if none was left.
        """
        some = self.left(sites)[: self._at_once]
        began = time.perf_counter()
        self._try(some)
        took = time.perf_counter() - began
        if took > seconds:
            self._at_once = max(1, len(some) // 2)
        elif took < _FEW * seconds:
            self._at_once = min(self._most_at_once, max(self._at_once, 2 * len(some)))
        return some

    def _try(self, sites: list[str]) -> None:
        for site in sites:
            self._hooks.install(site)
        # A probe that fails has shown nothing, and must be made again.
        if sites:
            self._dead |= self._probe(frozenset(sites))
            self._probed.update(sites)
