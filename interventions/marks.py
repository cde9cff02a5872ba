"""Tells which objects may go, where several servers share a registry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from interventions.leases import Lease

# A server may have read the names just before a deletion, and written its lease just after.
_READS: Final = 2


@dataclass(slots=True)
class _Mark:
    """Notes, of an object that no name needs any more, how far each server had read the names."""

    times_stored: int
    reads: dict[str, int | None] = field(default_factory=dict)


class Marks:
    """Remembers objects that no name needs, until no other server can hold one of them unseen.

    A server that has read the names since an object's last name went can pin it no more, and its
    lease lists it if it has pinned it before.
    """

    def __init__(self) -> None:
        self._marks: dict[str, _Mark] = {}

    def ripe(
        self, unneeded: Mapping[str, int], others: Mapping[str, Lease | None]
    ) -> frozenset[str]:
        """Mark objects, and tell those that may go.

        Args:
            unneeded: how often each digest was ever stored under a name.
            others: the leases of the other servers that live.
        """
        ripe: set[str] = set()
        marks: dict[str, _Mark] = {}
        for digest, times_stored in unneeded.items():
            mark = self._marks.get(digest)
            # A name may have come and gone since, with servers that have taken it up meanwhile.
            if mark is None or mark.times_stored != times_stored:
                mark = _Mark(
                    times_stored, {server: _reads(other) for server, other in others.items()}
                )
            marks[digest] = mark
            # A server that came later has read the names later too.
            if all(_past(mark, digest, server, other) for server, other in others.items()):
                ripe.add(digest)
        self._marks = marks
        return frozenset(ripe)


def _past(mark: _Mark, digest: str, server: str, lease: Lease | None) -> bool:
    """Whether a server does not hold an object, and cannot do so any more."""
    if lease is None:
        return False
    if server not in mark.reads:
        return digest not in lease.held
    before = mark.reads[server]
    if before is None:
        mark.reads[server] = lease.reads
        return False
    return digest not in lease.held and lease.reads >= before + _READS


def _reads(lease: Lease | None) -> int | None:
    return None if lease is None else lease.reads
