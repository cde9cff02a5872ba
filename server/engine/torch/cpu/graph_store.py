"""Which variants of layers have graphs: those that are always wanted, and a few of the others.

A graph takes a processor for about a minute and some megabytes, so it is made only for a variant
that many steps have wanted over a while. There are so many of these at most; one that nobody uses
any more gives way to the next.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from server.engine.torch.cpu.layer_graphs import Graphs, Variant
from server.engine.torch.cpu.recurring import Habit, Recurring

MOST_GRAPHS: Final = 16  # of variants beside those that are always wanted
# About as many steps as a dozen answers have, so that making a graph pays.
HABIT: Final = Habit(times=1000, seconds=60.0, pause=600.0)
_UNUSED_SECONDS: Final = 300.0  # after which a graph gives way; sooner, many would be made in turns


class GraphStore:
    """Used on the engine thread, but for `settle`."""

    def __init__(
        self,
        ask: Callable[[Variant], None],
        habit: Habit = HABIT,
        most: int = MOST_GRAPHS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` has a variant's graphs made, and then calls `settle` from any thread."""
        self._ask = ask
        self._most = most
        self._clock = clock
        self._recurring = Recurring[Variant](habit, clock)
        self._lasting: set[Variant] = set()
        self._graphs: dict[Variant, Graphs | None] = {}  # None: they could not be made
        # When each variant was last used that does not last; the least recently used first.
        self._used: OrderedDict[Variant, float] = OrderedDict()

    def expect(self, variant: Variant) -> None:
        """Have a variant's graphs made now; they stay."""
        if variant not in self._lasting:
            self._lasting.add(variant)
            self._ask(variant)

    def settle(self, variant: Variant, graphs: Graphs | None) -> None:
        """Take what was made of a variant that was asked for; None where nothing could be."""
        self._graphs[variant] = graphs

    def has(self, variant: Variant) -> bool:
        """Whether a variant's graphs are ready."""
        return self._graphs.get(variant) is not None

    def find(self, variant: Variant) -> Graphs | None:
        """A variant's graphs for a step, if they are ready; asks for them if they are worth it."""
        if variant in self._lasting:
            return self._graphs.get(variant)
        if variant in self._used:
            self._used[variant] = self._clock()
            self._used.move_to_end(variant)
            return self._graphs.get(variant)
        if self._recurring.wanted(variant) and self._make_room():
            self._used[variant] = self._clock()
            self._recurring.forget(variant)
            self._ask(variant)
        return None

    def _make_room(self) -> bool:
        """Whether there is a place for one variant more, if need be that of an unused one."""
        if len(self._used) < self._most:
            return True
        oldest, last = next(iter(self._used.items()))
        # One that is not settled is being made.
        if oldest not in self._graphs or self._clock() - last < _UNUSED_SECONDS:
            return False
        del self._used[oldest], self._graphs[oldest]
        return True
