"""Tells which intervention holds which slot of the bank, with pins and LRU eviction."""

from collections import Counter, OrderedDict
from collections.abc import Mapping

from server.engine.errors import BankFullError


class SlotTable:
    """Maps digests to slots 1..capacity.

    A slot may have many pins, each for one user of its intervention. Slots without pins are
    evicted when others are needed, the least recently used first.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pins: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """The number of slots that hold an intervention, pinned or not."""
        return len(self._slots)

    @property
    def capacity(self) -> int:
        """The number of all slots."""
        return len(self._free) + len(self._slots)

    def is_loaded(self, digest: str) -> bool:
        """Return whether an intervention is loaded."""
        return digest in self._slots

    def pin(self, digest: str) -> int | None:
        """Pin a loaded intervention and return its slot; None if it is not loaded."""
        slot = self._slots.get(digest)
        if slot is not None:
            self._slots.move_to_end(digest)
            self._pins[digest] += 1
        return slot

    def unpin(self, digest: str) -> None:
        """Remove one pin. The intervention stays loaded until its slot is needed for another."""
        assert self._pins[digest] > 0, f"{digest} is not pinned"
        self._pins[digest] -= 1

    def take(self, digest: str) -> int:
        """Take a slot for an intervention that is not loaded, and pin it; evict one if need be.

        Raises:
            BankFullError: every slot is pinned.
        """
        assert digest not in self._slots, f"{digest} is loaded already"
        slot = self._free.pop() if self._free else self._evict()
        self._slots[digest] = slot
        self._pins[digest] += 1
        return slot

    def drop(self, digest: str) -> None:
        """Free the slot of an intervention whose loading failed."""
        self._free.append(self._slots.pop(digest))
        del self._pins[digest]

    def check(self, pins: Mapping[str, int]) -> None:
        """Assert that the pins are those given, and that every slot is free or holds one digest."""
        assert +self._pins == Counter(pins), "pins are lost, or held for nobody"
        assert pins.keys() <= self._slots.keys(), "a pinned intervention has no slot"
        slots = sorted((*self._free, *self._slots.values()))
        assert slots == list(range(1, self.capacity + 1)), "slots are lost or held twice"

    def _evict(self) -> int:
        for digest in self._slots:
            if not self._pins[digest]:
                return self._slots.pop(digest)
        raise BankFullError(
            f"all {len(self._slots)} slots for interventions are held by running requests; "
            "try again later"
        )
