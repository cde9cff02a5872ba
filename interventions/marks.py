"""Decides which unneeded objects may be removed from a registry that several servers share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from interventions.leases import Lease

# One read is not enough: a server may read the names just before the object's last name is deleted,
# and write the lease that counts this read just after.
_READS: Final = 2


@dataclass(slots=True)
class _Mark:
    """An unneeded object: how often it had been stored when it was first found so.

    `reads` has each server's `Lease.reads` at that moment; None until its lease is known.
    """

    times_stored: int
    reads: dict[str, int | None] = field(default_factory=dict)


class Marks:
    """Remembers objects that no name needs, until the other servers' leases show that they may go.

    A server that has read the names since an object lost its last name cannot pin the object any
    more. If it has pinned the object before, its lease lists it.
    """

    def __init__(self) -> None:
        self._marks: dict[str, _Mark] = {}

    def removable(
        self, unneeded: Mapping[str, int], others: Mapping[str, Lease | None]
    ) -> frozenset[str]:
        """Mark unneeded objects, and return those that may be removed.

        Args:
            unneeded: the digests, and how often each was ever stored under a name.
            others: the leases of the other servers that live; None for one that cannot be read.
        """
        removable: set[str] = set()
        marks: dict[str, _Mark] = {}
        for digest, times_stored in unneeded.items():
            mark = self._marks.get(digest)
            # The object may have had a name in between, by which a server has pinned it.
            if mark is None or mark.times_stored != times_stored:
                reads = {
                    server: None if other is None else other.reads
                    for server, other in others.items()
                }
                mark = _Mark(times_stored, reads)
            marks[digest] = mark
            # A server that the mark lacks has opened the registry later, and read the names then.
            if all(_cannot_hold(mark, digest, server, other) for server, other in others.items()):
                removable.add(digest)
        self._marks = marks
        return frozenset(removable)


def _cannot_hold(mark: _Mark, digest: str, server: str, lease: Lease | None) -> bool:
    """Return whether a server does not hold an object, and cannot pin it any more.

    A lease that is known for the first time is noted in the mark.
    """
    if lease is None:
        return False
    if server not in mark.reads:
        return digest not in lease.held
    before = mark.reads[server]
    if before is None:
        mark.reads[server] = lease.reads
        return False
    return digest not in lease.held and lease.reads >= before + _READS
