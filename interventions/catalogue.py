"""What a registry holds, in memory, and the answers that need no disk."""

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
DELETED_SUFFIX: Final = ".deleted"  # of a record that was deleted where no new one had room


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored intervention, as a name or a digest refers to it."""

    name: str  # or "sha256:<digest>" where no name points to the digest
    digest: str
    size: int  # of the artifact, in bytes
    created: datetime  # when it was stored here
    manifest: Manifest
    history: tuple[Version, ...]  # of the name, oldest first


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that cannot be understood. It stays where it is, for a person to look at."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Tells what is stored, and what of it is damaged, at one moment; replaced, never changed.

    So any thread may read one, without a lock, while another makes the next.
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
        """As `Registry.resolve`."""
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
        """As `Registry.get`."""
        record = self.records.get(name)
        damage = self.damaged_records.get(name + RECORD_SUFFIX)
        if record is not None and record.current is not None:
            return self._entry(name, record.current, record.versions)
        if damage is not None:
            raise DamagedInterventionError(name, f"{damage.reason}.")
        raise UnknownInterventionError(name)

    def history(self, name: str) -> tuple[Version, ...]:
        """As `Registry.history`."""
        record = self.records.get(name)
        if record is None:
            raise UnknownInterventionError(name)
        return record.versions

    def names_of(self, digest: str) -> frozenset[str]:
        """As `Registry.names_of`."""
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
        """As `Registry.entries`."""
        return [
            self._entry(name, record.current, record.versions)
            for name, record in sorted(self.records.items())
            if record.current is not None and record.current.digest in self.objects
        ]

    def damaged(self) -> tuple[Damage, ...]:
        """Every damaged file."""
        return (*self.damaged_records.values(), *self.damaged_objects.values())

    def known(self, name: str) -> bool:
        """As `Registry.known`."""
        return name in self.records or name + RECORD_SUFFIX in self.damaged_records

    def summary(self, digest: str) -> Summary:
        """The header of a stored object.

        Raises:
            UnknownInterventionError: there is none, or it is damaged.
        """
        summary = self.objects.get(digest)
        if summary is None:
            raise UnknownInterventionError(DIGEST_PREFIX + digest)
        return summary

    def refers_to(self, digest: str) -> bool:
        """Whether the history of a live name has the digest."""
        return digest in self._referred

    def needs(self, digest: str) -> bool:
        """Whether a live name may need the digest.

        While a record is damaged, what it refers to is not known: then any digest is needed.
        """
        return self.refers_to(digest) or bool(self.damaged_records)

    def times_stored(self, digests: Iterable[str]) -> dict[str, int]:
        """How often each of these digests was stored under a name, ever."""
        times = dict.fromkeys(digests, 0)
        for record in self.records.values():
            for version in record.versions:
                if version.digest in times:
                    times[version.digest] += 1
        return times

    def with_objects(self, objects: Mapping[str, Summary]) -> "Catalogue":
        """The same, but for the objects: these, and no others. Reads no name's history."""
        other = copy(self)
        object.__setattr__(other, "objects", objects)
        return other

    def _entry(self, name: str, version: Version, history: tuple[Version, ...]) -> Entry:
        summary = self.objects.get(version.digest)
        if summary is None:
            raise DamagedInterventionError(name, "its artifact is missing or cannot be read.")
        return Entry(name, version.digest, summary.size, version.at, summary.manifest, history)
