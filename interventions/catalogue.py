"""What a registry holds, in memory, and the answers that need no disk."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from interventions.artifact import Summary
from interventions.manifest import Manifest
from interventions.records import NameRecord, Version

DIGEST_PREFIX: Final = "sha256:"
OBJECT_SUFFIX: Final = ".safetensors"
RECORD_SUFFIX: Final = ".json"


class RegistryError(Exception):
    """The registry cannot do what was asked, with one sentence that says why."""


class InvalidNameError(RegistryError):
    """A name that an intervention may not have."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:100]!r} is not a name: 1 to 64 of a-z, 0-9, '.', '_' and '-', the first a "
            "letter or digit."
        )
        self.name = name


class UnknownInterventionError(RegistryError):
    """Nothing is stored under a reference."""

    def __init__(self, reference: str, message: str | None = None) -> None:
        super().__init__(message or f'There is no intervention "{reference[:100]}".')
        self.reference = reference


class DamagedInterventionError(UnknownInterventionError):
    """Something was stored under the reference, but its files are damaged or missing."""

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(
            reference, f'The intervention "{reference[:100]}" is stored but damaged: {reason}'
        )


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


@dataclass(slots=True)
class Catalogue:
    """What is stored, and what of it is not usable. Whoever holds it sees to the locking."""

    objects: dict[str, Summary] = field(default_factory=dict)  # by digest
    records: dict[str, NameRecord] = field(default_factory=dict)  # by name
    damaged_objects: dict[str, Damage] = field(default_factory=dict)  # by file name
    damaged_records: dict[str, Damage] = field(default_factory=dict)  # by file name

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

    def can_be_dropped(self, digest: str) -> bool:
        """Whether an object is stored and no live name's history refers to it.

        Never while a record is damaged: what it refers to is not known.
        """
        return (
            digest in self.objects
            and not self.damaged_records
            and not any(
                version.digest == digest
                for record in self.records.values()
                for version in record.available
            )
        )

    def _entry(self, name: str, version: Version, history: tuple[Version, ...]) -> Entry:
        summary = self.objects.get(version.digest)
        if summary is None:
            raise DamagedInterventionError(name, "its artifact is missing or cannot be read.")
        return Entry(name, version.digest, summary.size, version.at, summary.manifest, history)
