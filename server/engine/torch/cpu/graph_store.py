"""Decides which variants of layers have graphs: the expected ones, and a few others.

Compiling keeps a processor busy for about a minute, and a graph takes some megabytes. So a variant
that was not expected gets graphs only when many steps have wanted it over a while. The number of
these variants is limited; one that is no longer used gives way to the next.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from server.engine.torch.cpu.layer_graphs import Graphs, Variant
from server.engine.torch.cpu.recurring import RecurrenceCounter, RecurrenceRule

MAX_GRAPHS: Final = 16  # variants with graphs, besides the expected ones
# About as many steps as a dozen answers have, so that making a graph pays.
RECURRENCE: Final = RecurrenceRule(times=1000, seconds=60.0, pause=600.0)
# A variant that was unused for so long may give way. If the time were shorter, many variants could
# be compiled in turns.
_UNUSED_SECONDS: Final = 300.0


class GraphStore:
    """Keeps graphs by variant. Used on the engine thread, except for `set_graphs`."""

    def __init__(
        self,
        start_making: Callable[[Variant], None],
        rule: RecurrenceRule = RECURRENCE,
        max_graphs: int = MAX_GRAPHS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start_making` starts to make a variant's graphs, which `set_graphs` is given later."""
        self._start_making = start_making
        self._max_graphs = max_graphs
        self._clock = clock
        self._recurring = RecurrenceCounter[Variant](rule, clock)
        self._permanent: set[Variant] = set()
        self._graphs: dict[Variant, Graphs | None] = {}  # None: they could not be made
        # The time when each variant that was not expected was last used, least recently used first.
        self._used: OrderedDict[Variant, float] = OrderedDict()

    def precompile(self, variant: Variant) -> None:
        """Have a variant's graphs made now, and keep them for good."""
        if variant not in self._permanent:
            self._permanent.add(variant)
            self._start_making(variant)

    def set_graphs(self, variant: Variant, graphs: Graphs | None) -> None:
        """Store the graphs that were made for a variant; None if they could not be made."""
        self._graphs[variant] = graphs

    def has_graphs(self, variant: Variant) -> bool:
        """Return whether a variant's graphs are ready."""
        return self._graphs.get(variant) is not None

    def find(self, variant: Variant) -> Graphs | None:
        """Return a variant's graphs if they are ready; have them made if they are worth it."""
        if variant in self._permanent:
            return self._graphs.get(variant)
        if variant in self._used:
            self._used[variant] = self._clock()
            self._used.move_to_end(variant)
            return self._graphs.get(variant)
        if self._recurring.count(variant) and self._make_room():
            self._used[variant] = self._clock()
            self._recurring.forget(variant)
            self._start_making(variant)
        return None

    def _make_room(self) -> bool:
        """Return whether one more variant may have graphs; drop an unused variant's if need be."""
        if len(self._used) < self._max_graphs:
            return True
        oldest, last = next(iter(self._used.items()))
        # A variant that is not settled is still being compiled.
        if oldest not in self._graphs or self._clock() - last < _UNUSED_SECONDS:
            return False
        del self._used[oldest], self._graphs[oldest]
        return True
