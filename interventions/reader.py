"""Reads a registry's folder, also one with damaged files."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias, TypeVar

from interventions.artifact import Summary, read_summary
from interventions.catalogue import (
    DELETED_SUFFIX,
    OBJECT_SUFFIX,
    RECORD_SUFFIX,
    Catalogue,
    Damage,
)
from interventions.header import ArtifactError, ArtifactLimits, UnreadableArtifactError
from interventions.manifest import DIGEST_PATTERN, NAME_PATTERN
from interventions.name_records import NameRecord, RecordError, Version, parse_record
from interventions.storage import UNREADABLE, FileState, file_state

_logger = logging.getLogger(__name__)

Content = TypeVar("Content", NameRecord, Summary)

# A file's state, its path, and its content, read after the state. The dictionaries below have
# strings for keys, not paths, because a thousand of them are compared every second.
_ReadRecord: TypeAlias = tuple[FileState, Path, NameRecord | Damage]
_ReadHeader: TypeAlias = tuple[FileState, Path, Summary | Damage]


@dataclass(frozen=True, slots=True)
class FolderContents:
    """The content of a folder when it was read."""

    catalogue: Catalogue
    marked: frozenset[str]  # names that were deleted by `mark_deleted`, and have no record of it


class FolderReader:
    """Reads every record and every object's header, and each file again only if it has changed.

    One thread at a time may call `read`, any thread `changed`.
    """

    def __init__(self, objects: Path, names: Path, limits: ArtifactLimits) -> None:
        self._objects, self._names = objects, names
        self._limits = limits
        self._records: dict[str, _ReadRecord] = {}
        self._headers: dict[str, _ReadHeader] = {}
        self._damaged_states: Mapping[Path, FileState] = {}  # of damaged and missing objects
        self._warned: frozenset[Damage] = frozenset()

    def changed(self) -> bool:
        """Tell from the files' states alone whether `read` would find anything new.

        Raises:
            OSError: the folder cannot be read.
        """
        known = {path: state for path, (state, _, _) in self._records.items()}
        return _states(self._names) != known or any(
            file_state(path) != state for path, state in self._damaged_states.items()
        )

    def read(self) -> FolderContents:
        """Read the folder; each damaged file is logged once, as a warning.

        Raises:
            OSError: the folder, or a record that was read before, cannot be read.
        """
        records = {
            path: self._record(path, state) for path, state in sorted(_states(self._names).items())
        }
        headers = {
            path: self._header(path, state) for path, state in sorted(self._object_states().items())
        }
        named, damaged_records = _split_damaged(records.values())
        marks = {file: record for file, record in named.items() if file.endswith(DELETED_SUFFIX)}
        marked = {record.name: record for record in marks.values()}
        # A record is newer than a mark of the same name.
        known = marked | {rec.name: rec for file, rec in named.items() if file not in marks}
        headed, damaged_objects = _split_damaged(headers.values())
        objects = {file.removesuffix(OBJECT_SUFFIX): summary for file, summary in headed.items()}
        missing = _missing_objects(self._objects, known, objects)
        damaged_objects = missing | damaged_objects
        self._records, self._headers = records, headers
        self._damaged_states = {
            damage.path: headers[str(damage.path)][0] if str(damage.path) in headers else ()
            for damage in damaged_objects.values()
        }
        catalogue = Catalogue(objects, known, damaged_objects, damaged_records)
        self._warn(catalogue.damaged())
        # A damaged record is newer too, and must not be overwritten.
        unwritten = {name for name in marked if name + RECORD_SUFFIX not in damaged_records}
        return FolderContents(catalogue, frozenset(unwritten))

    def _object_states(self) -> dict[str, FileState]:
        states: dict[str, FileState] = {}
        with os.scandir(self._objects) as shards:
            for shard in shards:
                states |= _states(shard.path) if shard.is_dir() else {shard.path: file_state(shard)}
        return states

    def _record(self, path: str, state: FileState) -> _ReadRecord:
        before = self._records.get(path)
        if before is not None and before[0] == state:
            return before
        file = Path(path)
        try:
            return state, file, _parse(file)
        except RecordError as error:
            return state, file, Damage(file, str(error))
        except OSError as error:
            if before is not None and before[0] != UNREADABLE:
                raise
            return UNREADABLE, file, Damage(file, str(error))

    def _header(self, path: str, state: FileState) -> _ReadHeader:
        before = self._headers.get(path)
        if before is not None and before[0] == state:
            return before
        file = Path(path)
        digest = file.name.removesuffix(OBJECT_SUFFIX)
        if not DIGEST_PATTERN.match(digest) or file.parent.name != digest[:2]:
            return state, file, Damage(file, "The file's name is not that of an object.")
        try:
            return state, file, read_summary(file, self._limits)
        except UnreadableArtifactError as error:
            return UNREADABLE, file, Damage(file, str(error))
        except ArtifactError as error:
            return state, file, Damage(file, str(error))

    def _warn(self, damaged: Iterable[Damage]) -> None:
        found = frozenset(damaged)
        for damage in sorted(found - self._warned, key=lambda each: each.path):
            _logger.warning("damaged, left as it is: %s: %s", damage.path, damage.reason)
        self._warned = found


def _states(folder: Path | str) -> dict[str, FileState]:
    with os.scandir(folder) as entries:
        return {entry.path: file_state(entry) for entry in entries}


def _parse(path: Path) -> NameRecord:
    """Read a name's record; a record with DELETED_SUFFIX gets its deletion as the last version.

    Raises:
        RecordError: the file is no record.
        OSError: it cannot be read.
    """
    suffix = DELETED_SUFFIX if path.name.endswith(DELETED_SUFFIX) else RECORD_SUFFIX
    name = path.name.removesuffix(suffix)
    if name == path.name or not NAME_PATTERN.match(name):
        raise RecordError("the file's name is not that of a record")
    record = parse_record(path.read_bytes(), name)
    if suffix == RECORD_SUFFIX:
        return record
    try:
        changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except (OverflowError, ValueError) as error:
        raise RecordError(f'the time at which "{name}" was deleted cannot be read') from error
    return record.with_version(Version("", changed, "deleted"))


def _split_damaged(
    files: Iterable[tuple[FileState, Path, Content | Damage]],
) -> tuple[dict[str, Content], dict[str, Damage]]:
    """Return the content of the readable files, and the damage of the others, by file name."""
    contents: dict[str, Content] = {}
    damaged: dict[str, Damage] = {}
    for _, path, content in files:
        if isinstance(content, Damage):
            damaged[path.name] = content
        else:
            contents[path.name] = content
    return contents, damaged


def _missing_objects(
    folder: Path, records: Mapping[str, NameRecord], objects: Mapping[str, Summary]
) -> dict[str, Damage]:
    missing: dict[str, Damage] = {}
    for name, record in records.items():
        if record.current is not None and record.current.digest not in objects:
            digest = record.current.digest
            path = folder / digest[:2] / f"{digest}{OBJECT_SUFFIX}"
            damage = Damage(path, f'The artifact that "{name}" points to is missing.')
            missing.setdefault(path.name, damage)
    return missing
