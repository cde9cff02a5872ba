"""Reads and changes the registry's files, without knowing their meaning.

    objects/<first two hex digits>/<digest>.safetensors   names/<name>.json   lock
    leases/<server>.json   tmp/<server>.<random>.tmp

A change is written to a temporary file, synced and renamed, and then the folder is synced: a crash
at any byte leaves the old state or the new one. The methods raise OSError.
"""

import logging
import os
import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from interventions.catalogue import DELETED_SUFFIX, OBJECT_SUFFIX, RECORD_SUFFIX
from interventions.errors import RegistryBusyError, RegistryError
from interventions.storage import (
    create,
    make_directory,
    publish,
    sync_directory,
    temporary_path,
    try_lock,
    write_synced,
)

LOCK_SECONDS: Final = 10.0  # longest wait of a change for another server's change
_LONGEST_PAUSE: Final = 0.02  # seconds between two tries to lock the folder

_logger = logging.getLogger(__name__)


class RegistryFolder:
    """The files of one registry. Only the holder of its lock may change them."""

    def __init__(self, root: Path, server: str) -> None:
        self._root = root
        self._server = server
        self.objects, self.names, self.leases = root / "objects", root / "names", root / "leases"
        self._temporary = root / "tmp"
        self._lock = root / "lock"
        self._names_synced = True
        self._leftovers: set[Path] = set()  # temporary files that could not be removed

    @contextmanager
    def locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the folder's lock during the block.

        Raises:
            RegistryBusyError: other servers have held it for `seconds`.
            OSError: the lock cannot be opened or locked.
        """
        deadline = time.monotonic() + seconds
        while True:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                held = try_lock(descriptor)
                # The folder may have been replaced, with another file of this name.
                if held and os.path.samestat(os.fstat(descriptor), self._lock.stat()):
                    yield
                    return
            finally:
                with suppress(OSError):  # nothing was written to it
                    os.close(descriptor)
            if time.monotonic() > deadline:
                raise RegistryBusyError(
                    f"Another server has been changing the registry for {seconds:.0f} s, or has "
                    "stopped in the middle of it; nothing was changed."
                )
            time.sleep(random.uniform(0, _LONGEST_PAUSE))

    def make(self) -> None:
        """Create the missing folders and the lock."""
        for folder in (self._root, self.objects, self.names, self._temporary, self.leases):
            make_directory(folder)
        self.repair()

    def repair(self) -> None:
        """Create folders that a restored backup may lack, but not the registry itself."""
        self.names.stat()
        for folder in (self.objects, self._temporary, self.leases):
            make_directory(folder)
        os.close(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def check_file_system(self) -> None:
        """Try out locks and renaming, which several servers rely on. The caller holds the lock.

        Raises:
            RegistryError: a lock does not keep others out, or renaming does not replace a file.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if try_lock(descriptor):
                raise RegistryError(_UNSUITABLE_FILE_SYSTEM.format(self._root, "lock files"))
        finally:
            os.close(descriptor)
        new, old = self.new_temporary(), self.new_temporary()
        try:
            for path in (new, old):
                os.close(create(path))
            before = new.stat()
            new.replace(old)
            if new.exists() or not os.path.samestat(before, old.stat()):
                raise RegistryError(
                    _UNSUITABLE_FILE_SYSTEM.format(self._root, "replace a file by renaming")
                )
        finally:
            self.remove_temporary(new)
            self.remove_temporary(old)

    def object_path(self, digest: str) -> Path:
        """Return the path of an object, stored or not."""
        return self.objects / digest[:2] / f"{digest}{OBJECT_SUFFIX}"

    def new_temporary(self) -> Path:
        """Return a path for a new temporary file."""
        return temporary_path(self._temporary, self._server)

    def remove_temporary(self, path: Path) -> None:
        """Remove a temporary file if it exists, later if the disk refuses it now."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("cannot be removed, tried again later: %s: %s", path, error)
            self._leftovers.add(path)
        else:
            self._leftovers.discard(path)

    def remove_leftovers(self, living: Collection[str]) -> None:
        """Remove the temporary files of ended servers, and those that earlier tries left."""
        for path in self._temporary.iterdir():
            server, _, _ = path.name.partition(".")
            if server not in living and (path.is_symlink() or not path.is_dir()):
                self.remove_temporary(path)
        for path in tuple(self._leftovers):
            self.remove_temporary(path)

    def move_object(self, temporary: Path, digest: str) -> None:
        """Move complete and synced bytes to their object's path, durably."""
        target = self.object_path(digest)
        make_directory(target.parent)
        publish(temporary, target)

    def remove_object(self, digest: str) -> None:
        """Remove an object's bytes, if they exist."""
        # A power cut must not bring back a name whose bytes are gone.
        self.sync_names()
        self.object_path(digest).unlink(missing_ok=True)

    def write_record(self, name: str, data: bytes) -> None:
        """Write a name's record, or leave the old one; `sync_names` makes it durable."""
        temporary = self.new_temporary()
        try:
            write_synced(temporary, data)
            self._names_synced = False
            temporary.replace(self._record_path(name))
        except BaseException:
            self.remove_temporary(temporary)
            raise

    def mark_deleted(self, name: str, at: datetime) -> None:
        """Delete a name by renaming its record, which works on a full disk.

        The file's modification time becomes the deletion's; `sync_names` makes it durable.
        """
        record = self._record_path(name)
        os.utime(record, (at.timestamp(), at.timestamp()))
        self._names_synced = False
        record.replace(self._mark_path(name))

    def remove_mark(self, name: str) -> None:
        """Remove the file that `mark_deleted` has renamed, once a new record says the same."""
        self._mark_path(name).unlink(missing_ok=True)

    def mark_names_unsynced(self) -> None:
        """Note that another server has changed records, which may not be durable yet."""
        self._names_synced = False

    def sync_names(self) -> None:
        """Make the records durable, unless they are already."""
        if not self._names_synced:
            sync_directory(self.names)
            self._names_synced = True

    def copy_record(self, name: str) -> Path:
        """Copy a damaged record beside itself, durably; return the copy's path."""
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

    def _mark_path(self, name: str) -> Path:
        return self.names / f"{name}{DELETED_SUFFIX}"


_UNSUITABLE_FILE_SYSTEM: Final = (
    "The registry {} is on a file system that cannot {}, as several servers rely on; use a local "
    "disk, or a file system that can, such as NFS 4 (see docs/scaling.md)."
)
