"""What a registry's folder holds when it is opened, after whatever happened to it before."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from interventions.artifact import ArtifactError, ArtifactLimits, Summary, read_summary
from interventions.catalogue import (
    DELETED_SUFFIX,
    OBJECT_SUFFIX,
    RECORD_SUFFIX,
    Catalogue,
    Damage,
)
from interventions.manifest import DIGEST_PATTERN, NAME_PATTERN
from interventions.records import NameRecord, RecordError, Version, parse_record

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Found:
    """What was read so far."""

    objects: dict[str, Summary] = field(default_factory=dict)
    records: dict[str, NameRecord] = field(default_factory=dict)
    damaged_objects: dict[str, Damage] = field(default_factory=dict)
    damaged_records: dict[str, Damage] = field(default_factory=dict)
    marked: dict[str, NameRecord] = field(default_factory=dict)  # by the name of the file alone


def read_catalogue(
    objects: Path, names: Path, limits: ArtifactLimits
) -> tuple[Catalogue, frozenset[str]]:
    """Read every record and every object's header; nothing is changed, no damage stops it.

    Each damaged file is logged as a warning.

    Returns:
        What is stored, and the names whose deletion was marked and not yet written.
    """
    found = _Found()
    for path in sorted(names.iterdir()):
        _read_record(path, found)
    for path in sorted(file for shard in objects.iterdir() for file in _files(shard)):
        _read_object(path, found, limits)
    records = {**found.marked, **found.records}  # a record is newer than the mark beside it
    _note_missing(objects, records, found)
    catalogue = Catalogue(found.objects, records, found.damaged_objects, found.damaged_records)
    for damage in catalogue.damaged():
        _logger.warning("damaged, left as it is: %s: %s", damage.path, damage.reason)
    # Not beside a damaged record: whatever that says, it is newer.
    unwritten = (name for name in found.marked if name + RECORD_SUFFIX not in found.damaged_records)
    return catalogue, frozenset(unwritten)


def _files(shard: Path) -> list[Path]:
    return list(shard.iterdir()) if shard.is_dir() else [shard]


def _read_record(path: Path, found: _Found) -> None:
    try:
        if path.name.endswith(DELETED_SUFFIX):
            record = _parse(path, DELETED_SUFFIX)
            changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            deleted = record.followed_by(Version("", changed, "deleted"))
            found.marked[record.name] = deleted
        else:
            record = _parse(path, RECORD_SUFFIX)
            found.records[record.name] = record
    except (RecordError, OSError) as error:
        found.damaged_records[path.name] = Damage(path, str(error))


def _parse(path: Path, suffix: str) -> NameRecord:
    name = path.name.removesuffix(suffix)
    if name == path.name or not NAME_PATTERN.match(name):
        raise RecordError("the file's name is not that of a record")
    return parse_record(path.read_bytes(), name)


def _read_object(path: Path, found: _Found, limits: ArtifactLimits) -> None:
    digest = path.name.removesuffix(OBJECT_SUFFIX)
    try:
        if not DIGEST_PATTERN.match(digest) or path.parent.name != digest[:2]:
            raise ArtifactError("The file's name is not that of an object.")
        found.objects[digest] = read_summary(path, limits)
    except (ArtifactError, OSError) as error:
        found.damaged_objects[path.name] = Damage(path, str(error))


def _note_missing(objects: Path, records: Mapping[str, NameRecord], found: _Found) -> None:
    for name, record in records.items():
        if record.current is None or record.current.digest in found.objects:
            continue
        digest = record.current.digest
        path = objects / digest[:2] / f"{digest}{OBJECT_SUFFIX}"
        found.damaged_objects.setdefault(
            path.name, Damage(path, f'The artifact that "{name}" points to is missing.')
        )
