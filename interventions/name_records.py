"""Defines the record of a name: every version that it ever pointed to, and its deletions."""

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import (
    AwareDatetime,
    ConfigDict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from interventions.manifest import NAME_PATTERN
from interventions.strict_json import StrictJSONError, parse_json

_STRICT: Final = ConfigDict(extra="forbid", strict=True)


class RecordError(ValueError):
    """A name's record is damaged."""


@dataclass(frozen=True, slots=True, config=_STRICT)
class Version:
    """One event of a name's history: a digest was stored under it, or the name was deleted."""

    digest: Annotated[str, StringConstraints(pattern=r"\A([0-9a-f]{64})?\z")]  # "" if deleted
    at: AwareDatetime
    event: Literal["stored", "deleted"]

    def __post_init__(self) -> None:
        if (self.event == "stored") != bool(self.digest):
            raise ValueError("a stored version has a digest and a deletion has none")


@dataclass(frozen=True, slots=True, config=_STRICT)
class NameRecord:
    """A name and its history, oldest first. A name that ends with a deletion is a tombstone."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    versions: tuple[Version, ...]
    format: Literal["steerserve-name/1"] = field(default="steerserve-name/1")

    def __post_init__(self) -> None:
        if not self.versions:
            raise ValueError("a name has at least one version")

    @property
    def current(self) -> Version | None:
        """The version that the name points to; None for a tombstone."""
        last = self.versions[-1]
        return last if last.event == "stored" else None

    @property
    def available(self) -> tuple[Version, ...]:
        """The versions since the last deletion, oldest first; their bytes are kept."""
        kept: list[Version] = []
        for version in reversed(self.versions):
            if version.event == "deleted":
                break
            kept.append(version)
        return tuple(reversed(kept))

    def with_version(self, version: Version) -> "NameRecord":
        """Return the record with one more event."""
        return NameRecord(self.name, (*self.versions, version))


_ADAPTER: Final[TypeAdapter[NameRecord]] = TypeAdapter(NameRecord)


def parse_record(data: bytes, name: str) -> NameRecord:
    """Read the record of a name from its JSON.

    Raises:
        RecordError: the bytes are no record, or the record of another name.
    """
    try:
        parse_json(
            data.decode(), limits=None
        )  # no limits, because it grows with the name's history
        record = _ADAPTER.validate_json(data)
    except (UnicodeDecodeError, StrictJSONError, ValidationError) as error:
        raise RecordError(f'the record of the name "{name}" cannot be read') from error
    if record.name != name:
        raise RecordError(f'the record of the name "{name}" is that of "{record.name}"')
    return record


def record_bytes(record: NameRecord) -> bytes:
    """Return the record as JSON."""
    return _ADAPTER.dump_json(record, indent=1)
