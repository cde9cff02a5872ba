"""What comes again and again, and so is worth work ahead of its next use."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_MOST_KEYS: Final = 256  # that are counted at once; the least recently wanted are forgotten


@dataclass(frozen=True, slots=True)
class Habit:
    """When something counts as recurring."""

    times: int  # it was wanted so often
    seconds: float  # over at least so long
    pause: float  # without a pause of so many seconds

    @classmethod
    def at_once(cls) -> "Habit":
        """Everything recurs from its first time on."""
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
        """Count one time that a key is wanted; whether it recurs by now."""
        now, habit = self._clock(), self._habit
        count = self._counts.pop(key, None)
        if count is None or now - count.last > habit.pause:
            count = _Count(0, now, now)
        count.times += 1
        count.last = now
        self._counts[key] = count
        if len(self._counts) > _MOST_KEYS:
            self._counts.popitem(last=False)
        return count.times >= habit.times and now - count.first >= habit.seconds

    def forget(self, key: Key) -> None:
        """Count a key from nothing again."""
        self._counts.pop(key, None)
