"""Tells which keys are wanted again and again, and so are worth work ahead of their next use."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_MAX_KEYS: Final = 256  # keys that are counted; beyond, the least recently wanted is forgotten


@dataclass(frozen=True, slots=True)
class Habit:
    """The conditions under which a key counts as recurring."""

    times: int  # it was wanted at least so many times,
    seconds: float  # over at least so many seconds,
    pause: float  # without a longer pause than this, in seconds

    @classmethod
    def at_once(cls) -> "Habit":
        """Return a habit by which every key recurs from its first time on."""
        return cls(times=1, seconds=0.0, pause=float("inf"))


@dataclass(slots=True)
class _Count:
    times: int
    first: float
    last: float


class Recurring(Generic[Key]):
    """Counts how often each key is wanted. Used from one thread."""

    def __init__(self, habit: Habit, clock: Callable[[], float] = time.monotonic) -> None:
        self._habit = habit
        self._clock = clock
        self._counts: OrderedDict[Key, _Count] = OrderedDict()

    def wanted(self, key: Key) -> bool:
        """Count one time that a key is wanted, and return whether it recurs by now."""
        now, habit = self._clock(), self._habit
        count = self._counts.pop(key, None)
        if count is None or now - count.last > habit.pause:
            count = _Count(0, now, now)
        count.times += 1
        count.last = now
        self._counts[key] = count
        if len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)
        return count.times >= habit.times and now - count.first >= habit.seconds

    def forget(self, key: Key) -> None:
        """Reset a key's count."""
        self._counts.pop(key, None)
