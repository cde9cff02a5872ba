"""Tells which keys are wanted again and again, and so are worth work ahead of their next use."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_MAX_KEYS: Final = 256  # keys that are counted; beyond, the least recently wanted is forgotten


@dataclass(frozen=True, slots=True)
class RecurrenceRule:
    """The conditions under which a key counts as recurring."""

    times: int  # it was wanted at least so many times,
    seconds: float  # over at least so many seconds,
    pause: float  # without a longer pause than this, in seconds

    @classmethod
    def at_once(cls) -> "RecurrenceRule":
        """Return a rule by which every key recurs from its first time on."""
        return cls(times=1, seconds=0.0, pause=float("inf"))


@dataclass(slots=True)
class _Count:
    times: int
    first: float
    last: float


class RecurrenceCounter(Generic[Key]):
    """Counts how often each key is wanted. Used from one thread."""

    def __init__(self, rule: RecurrenceRule, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule = rule
        self._clock = clock
        self._counts: OrderedDict[Key, _Count] = OrderedDict()

    def count(self, key: Key) -> bool:
        """Count one time that a key is wanted, and return whether it recurs by now."""
        now, rule = self._clock(), self._rule
        count = self._counts.pop(key, None)
        if count is None or now - count.last > rule.pause:
            count = _Count(0, now, now)
        count.times += 1
        count.last = now
        self._counts[key] = count
        if len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)
        return count.times >= rule.times and now - count.first >= rule.seconds

    def forget(self, key: Key) -> None:
        """Reset a key's count."""
        self._counts.pop(key, None)
