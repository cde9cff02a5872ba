"""Keeps in memory what a registry's folder holds, and answers questions about it."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from interventions.artifact import Summary
from interventions.errors import DamagedInterventionError, UnknownInterventionError
from interventions.manifest import Manifest
from interventions.name_records import NameRecord, Version

DIGEST_PREFIX: Final = "sha256:"
OBJECT_SUFFIX: Final = ".safetensors"
RECORD_SUFFIX: Final = ".json"
DELETED_SUFFIX: Final = ".deleted"  # replaces RECORD_SUFFIX when a name is deleted on a full disk


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored intervention, found by a name or a digest."""

    name: str  # or "sha256:<digest>" if no name points to the digest
    digest: str
    size: int  # of the artifact, in bytes
    created: datetime  # when it was stored here
    manifest: Manifest
    history: tuple[Version, ...]  # of the name, oldest first


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged file, which stays in the folder for a person to look at."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Lists the stored objects and names, and the damaged files, of one moment.

    `Registry` documents the methods of equal names.

    A catalogue never changes, so any thread may read it without a lock.
    """

    objects: Mapping[str, Summary]  # by digest
    records: Mapping[str, NameRecord]  # by name
    damaged_objects: Mapping[str, Damage]  # by file name
    damaged_records: Mapping[str, Damage]  # by file name
    _referred: frozenset[str] = field(init=False)  # digests in the history of live names

    def __post_init__(self) -> None:
        referred = frozenset(
            version.digest for record in self.records.values() for version in record.available
        )
        object.__setattr__(self, "_referred", referred)

    def resolve(self, reference: str) -> Entry:
        if not reference.startswith(DIGEST_PREFIX):
            return self.get(reference)
        digest = reference.removeprefix(DIGEST_PREFIX)
        records = [self.records[name] for name in sorted(self.records)]
        for record in records:
            if record.current is not None and record.current.digest == digest:
                return self._entry(record.name, record.current, record.versions)
        for record in records:
            for version in record.available:
                if version.digest == digest:
                    return self._entry(reference, version, (version,))
        raise UnknownInterventionError(reference)

    def get(self, name: str) -> Entry:
        record = self.records.get(name)
        damage = self.damaged_records.get(name + RECORD_SUFFIX)
        if record is not None and record.current is not None:
            return self._entry(name, record.current, record.versions)
        if damage is not None:
            raise DamagedInterventionError(name, f"{damage.reason}.")
        raise UnknownInterventionError(name)

    def names_of(self, digest: str) -> frozenset[str]:
        """Return the names that point to a digest; if none does, the live names that once did."""
        records = self.records.values()
        current = {
            record.name
            for record in records
            if record.current is not None and record.current.digest == digest
        }
        return frozenset(current) or frozenset(
            record.name
            for record in records
            if any(version.digest == digest for version in record.available)
        )

    def entries(self) -> list[Entry]:
        return [
            self._entry(name, record.current, record.versions)
            for name, record in sorted(self.records.items())
            if record.current is not None and record.current.digest in self.objects
        ]

    def damaged(self) -> tuple[Damage, ...]:
        """Return every damaged or missing file."""
        return (*self.damaged_records.values(), *self.damaged_objects.values())

    def known(self, name: str) -> bool:
        return name in self.records or name + RECORD_SUFFIX in self.damaged_records

    def summary(self, digest: str) -> Summary:
        """Return the header of a stored object.

        Raises:
            UnknownInterventionError: the object is not stored, or damaged.
        """
        summary = self.objects.get(digest)
        if summary is None:
            raise UnknownInterventionError(DIGEST_PREFIX + digest)
        return summary

    def refers_to(self, digest: str) -> bool:
        """Tell whether the history of a name that is not deleted has the digest."""
        return digest in self._referred

    def needs(self, digest: str) -> bool:
        """Tell whether a name may need the digest.

        A damaged record may refer to any digest, so while there is one, every digest is needed.
        """
        return self.refers_to(digest) or bool(self.damaged_records)

    def times_stored(self, digests: Iterable[str]) -> dict[str, int]:
        """Count for each digest how often it was ever stored under a name."""
        times = dict.fromkeys(digests, 0)
        for record in self.records.values():
            for version in record.versions:
                if version.digest in times:
                    times[version.digest] += 1
        return times

    def with_objects(self, objects: Mapping[str, Summary]) -> "Catalogue":
        """Return a copy of the catalogue with other objects."""
        other = copy(self)
        object.__setattr__(other, "objects", objects)
        return other

    def _entry(self, name: str, version: Version, history: tuple[Version, ...]) -> Entry:
        summary = self.objects.get(version.digest)
        if summary is None:
            raise DamagedInterventionError(name, "its artifact is missing or cannot be read.")
        return Entry(name, version.digest, summary.size, version.at, summary.manifest, history)
