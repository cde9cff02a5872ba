"""The registry's files, and every change of them. What they mean is for others to know.

    objects/<first two hex digits>/<digest>.safetensors   names/<name>.json   tmp/   lock

A change is written to a temporary file, synced, renamed, and the folder synced: so a crash at any
byte leaves the old state or the new one. The methods raise OSError.
"""

import logging
import os
from datetime import datetime
from pathlib import Path

from interventions.catalogue import DELETED_SUFFIX, OBJECT_SUFFIX, RECORD_SUFFIX
from interventions.storage import (
    lock_exclusively,
    make_directory,
    publish,
    sync_directory,
    temporary_path,
    write_synced,
)

_logger = logging.getLogger(__name__)


class RegistryFolder:
    """The files of one registry. Changes are for one thread at a time, temporary files for any."""

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is read or written."""
        self._root = root
        self.objects, self.names = root / "objects", root / "names"
        self._temporary = root / "tmp"
        self._lock_descriptor: int | None = None
        self._names_synced = True
        self._leftovers: set[Path] = set()  # temporary files that could not be removed

    @property
    def locked(self) -> bool:
        """Whether this process holds the folder's lock."""
        return self._lock_descriptor is not None

    def lock(self) -> None:
        """Hold the folder's lock until `unlock`, creating the folder where it does not exist.

        Raises:
            BlockingIOError: another process holds it.
        """
        make_directory(self._root)
        self._lock_descriptor = lock_exclusively(self._root / "lock")

    def unlock(self) -> None:
        """Let another process lock the folder. Harmless when done before."""
        descriptor, self._lock_descriptor = self._lock_descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def prepare(self) -> None:
        """Create the folders inside, and remove what unfinished writes left."""
        for folder in (self.objects, self.names, self._temporary):
            make_directory(folder)
        for path in tuple(self._temporary.iterdir()):
            if path.is_dir() and not path.is_symlink():
                _logger.warning("not one of the registry's files, left as it is: %s", path)
            else:
                self.remove_temporary(path)

    def object_path(self, digest: str) -> Path:
        """Return the path of an object, stored or not."""
        return self.objects / digest[:2] / f"{digest}{OBJECT_SUFFIX}"

    def new_temporary(self) -> Path:
        """A path for a temporary file, which does not exist yet."""
        return temporary_path(self._temporary)

    def remove_temporary(self, path: Path) -> None:
        """Remove a temporary file, if it exists: now, or later where the disk refuses it now."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("cannot be removed, tried again later: %s: %s", path, error)
            self._leftovers.add(path)
        else:
            self._leftovers.discard(path)

    def remove_leftovers(self) -> None:
        """Try once more to remove the temporary files that could not be removed before."""
        for path in tuple(self._leftovers):
            self.remove_temporary(path)

    def move_object(self, temporary: Path, digest: str) -> None:
        """Move complete and synced bytes to their object's place; `sync_object` makes it last."""
        target = self.object_path(digest)
        make_directory(target.parent)
        temporary.replace(target)

    def sync_object(self, digest: str) -> None:
        """Make the object's name durable."""
        sync_directory(self.object_path(digest).parent)

    def remove_object(self, digest: str) -> None:
        """Remove an object's bytes, if they are there."""
        # What is forgotten must stay forgotten, before its bytes go.
        self.sync_names()
        self.object_path(digest).unlink(missing_ok=True)

    def write_record(self, name: str, data: bytes) -> None:
        """Write a name's record, or leave it as it was; `sync_names` makes it last."""
        temporary = self.new_temporary()
        try:
            write_synced(temporary, data)
            self._names_synced = False
            temporary.replace(self._record_path(name))
        except BaseException:
            self.remove_temporary(temporary)
            raise

    def mark_deleted(self, name: str, at: datetime) -> None:
        """Delete a name by renaming its record, which needs no room; `sync_names` makes it last.

        The time of the deletion is then that of the file's last change.
        """
        record = self._record_path(name)
        os.utime(record, (at.timestamp(), at.timestamp()))
        self._names_synced = False
        record.replace(self._deleted_path(name))

    def remove_mark(self, name: str) -> None:
        """Remove what `mark_deleted` left, once the name has a record that says the same."""
        self._deleted_path(name).unlink(missing_ok=True)

    def sync_names(self) -> None:
        """Make the records durable, unless they are."""
        if not self._names_synced:
            sync_directory(self.names)
            self._names_synced = True

    def copy_record(self, name: str) -> Path:
        """Copy a record that cannot be understood beside itself, durably; returns where."""
        temporary = self.new_temporary()
        copy = self.names / f"{name}{RECORD_SUFFIX}{temporary.stem}.damaged"
        try:
            write_synced(temporary, self._record_path(name).read_bytes())
            publish(temporary, copy)
        except BaseException:
            self.remove_temporary(temporary)
            self.remove_temporary(copy)
            raise
        return copy

    def _record_path(self, name: str) -> Path:
        return self.names / f"{name}{RECORD_SUFFIX}"

    def _deleted_path(self, name: str) -> Path:
        return self.names / f"{name}{DELETED_SUFFIX}"
