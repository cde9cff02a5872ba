"""The registry's files, and every change of them. What they mean is for others to know.

    objects/<first two hex digits>/<digest>.safetensors   names/<name>.json   lock
    leases/<server>.json   tmp/<server>.<random>.tmp

A change is written to a temporary file, synced, renamed, and the folder synced: so a crash at any
byte leaves the old state or the new one. The methods raise OSError.
"""

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final

from interventions.catalogue import DELETED_SUFFIX, OBJECT_SUFFIX, RECORD_SUFFIX
from interventions.errors import RegistryBusyError, RegistryError
from interventions.storage import (
    LockedError,
    create,
    locked,
    make_directory,
    publish,
    sync_directory,
    temporary_path,
    try_lock,
    write_synced,
)

LOCK_SECONDS: Final = 10.0  # that a change waits for another server's

_logger = logging.getLogger(__name__)


class RegistryFolder:
    """The files of one registry. Changes are for whoever holds its lock."""

    def __init__(self, root: Path, server: str) -> None:
        """Name the folder, and the server that uses it; nothing is read or written."""
        self._root = root
        self._server = server
        self.objects, self.names, self.leases = root / "objects", root / "names", root / "leases"
        self._temporary = root / "tmp"
        self._lock = root / "lock"
        self._names_synced = True
        self._leftovers: set[Path] = set()  # temporary files that could not be removed

    @contextmanager
    def locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Holds the folder's lock for the block.

        Raises:
            RegistryBusyError: others have held it for so many seconds.
        """
        try:
            with locked(self._lock, seconds):
                yield
        except LockedError as error:
            raise RegistryBusyError(
                f"Another server has been changing the registry for {seconds:.0f} s, or has "
                "stopped in the middle of it; nothing was changed."
            ) from error

    def make(self) -> None:
        """Create the folders and the lock where they do not exist."""
        for folder in (self._root, self.objects, self.names, self._temporary, self.leases):
            make_directory(folder)
        self.repair()

    def repair(self) -> None:
        """Create what a registry that was brought back may lack, but not the registry itself."""
        self.names.stat()
        for folder in (self.objects, self._temporary, self.leases):
            make_directory(folder)
        os.close(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def check_file_system(self) -> None:
        """Try what several servers rely on. For whoever holds the lock.

        Raises:
            RegistryError: a lock does not keep others out, or renaming does not replace a file.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if try_lock(descriptor):
                raise RegistryError(_UNSUITED.format(self._root, "lock files"))
        finally:
            os.close(descriptor)
        new, old = self.new_temporary(), self.new_temporary()
        try:
            for path in (new, old):
                os.close(create(path))
            before = new.stat()
            new.replace(old)
            if new.exists() or not os.path.samestat(before, old.stat()):
                raise RegistryError(_UNSUITED.format(self._root, "replace a file by renaming"))
        finally:
            self.remove_temporary(new)
            self.remove_temporary(old)

    def object_path(self, digest: str) -> Path:
        """Return the path of an object, stored or not."""
        return self.objects / digest[:2] / f"{digest}{OBJECT_SUFFIX}"

    def new_temporary(self) -> Path:
        """A path for a temporary file, which does not exist yet."""
        return temporary_path(self._temporary, self._server)

    def remove_temporary(self, path: Path) -> None:
        """Remove a temporary file, if it exists: now, or later where the disk refuses it now."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("cannot be removed, tried again later: %s: %s", path, error)
            self._leftovers.add(path)
        else:
            self._leftovers.discard(path)

    def remove_leftovers(self, living: Collection[str]) -> None:
        """Remove the temporary files of servers that live no more, and what could not be before."""
        for path in self._temporary.iterdir():
            server, _, _ = path.name.partition(".")
            if server not in living and (path.is_symlink() or not path.is_dir()):
                self.remove_temporary(path)
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
        # A power cut must not bring back a name whose bytes are gone.
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

    def names_changed(self) -> None:
        """Note that another server has changed records, which may not be durable."""
        self._names_synced = False

    def sync_names(self) -> None:
        """Make the records durable, unless they are."""
        if not self._names_synced:
            sync_directory(self.names)
            self._names_synced = True

    def copy_record(self, name: str) -> Path:
        """Copy a record that cannot be understood beside itself, durably; returns where."""
        temporary = self.new_temporary()
        copy = self.names / f"{name}{RECORD_SUFFIX}.{temporary.stem}.damaged"
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


_UNSUITED: Final = (
    "The registry {} is on a file system that cannot {}, as several servers rely on; use a local "
    "disk, or a file system that can, such as NFS 4 (see docs/scaling.md)."
)
