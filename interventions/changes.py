"""Every change of a registry: one after the other, on the disk first, then for all to see."""

import errno
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Final

from interventions.catalogue import RECORD_SUFFIX, Catalogue, Entry
from interventions.defaults import check_default
from interventions.errors import (
    DamagedInterventionError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryError,
    UnknownInterventionError,
    disk_errors,
    is_full,
)
from interventions.folder import LOCK_SECONDS, RegistryFolder
from interventions.leases import Leases
from interventions.marks import Marks
from interventions.name_records import NameRecord, Version, record_bytes
from interventions.pins import PinnedCatalogue
from interventions.reader import FolderReader, Found
from interventions.staged_upload import StagedUpload

_LOOK_SECONDS: Final = 1.0  # that a look waits for a change: the next one comes soon

_logger = logging.getLogger(__name__)


class RegistryChanges:
    """Changes a folder that other servers change too, and shows what it holds after each change.

    The folder's lock is held for one change, which begins with reading what the others have done.
    If a change fails, the folder is as it was, or as it should be after it.
    """

    def __init__(
        self, folder: RegistryFolder, reader: FolderReader, leases: Leases, stored: PinnedCatalogue
    ) -> None:
        """Read the folder, and remove what nothing needs. The folder is locked by the caller."""
        self._folder = folder
        self._reader = reader
        self._leases = leases
        self._stored = stored
        self._marks = Marks()
        self._using = threading.Lock()  # keeps this process's threads in order; never on a loop
        self._closed = False
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._removal: Future[None] | None = None  # the last one
        self._found: Found = reader.read()
        self._collect()

    def close(self) -> None:
        """Wait for running changes, take no more, and give the lease up.

        Where a change does not end, as its disk hangs, the lease ends with this process.
        """
        self._remover.shutdown(wait=False)
        if not self._using.acquire(timeout=LOCK_SECONDS):
            self._closed = True
            _logger.warning("the lease is not removed, as a change of the registry does not end")
            return
        try:
            self._closed = True
            self._leases.close()
        except OSError as error:
            _logger.warning("the lease cannot be removed: %s", error)
        finally:
            self._using.release()

    def check_open(self) -> None:
        """Raise RegistryError if the registry is closed."""
        if self._closed:
            raise RegistryError("The registry is closed.")

    def store(self, staged: StagedUpload, digest: str, name: str) -> tuple[Entry, bool]:
        """Move checked and durable bytes to their place, and point the name to them.

        Returns and raises as `Registry.commit`.
        """
        with self._changing():
            check_default(self._leases, self._catalogue, name, digest)
            was_stored = digest in self._found.catalogue.objects
            try:
                # Even where it is stored already: equal bytes, and it heals a damaged object.
                self._folder.move_object(staged.path, digest)
                self._folder.sync_object(digest)
                changed = self._point(name, digest)
            except OSError:  # not RegistryDiskError: with that, the name points there by now
                if not was_stored:
                    self._remove_new(digest)
                raise
            try:
                return self._catalogue.get(name), changed
            except DamagedInterventionError as error:
                lost = OSError(errno.EIO, "What was just written cannot be read back")
                raise RegistryDiskError(lost, visible=True) from error

    def delete(self, name: str) -> str:
        """As `Registry.delete`."""
        with self._changing():
            record = self._catalogue.records.get(name)
            if record is None or record.current is None:
                self._catalogue.get(name)  # raises, saying which
                raise UnknownInterventionError(name)
            check_default(self._leases, self._catalogue, name, None)
            deleted = _followed(name, record, Version("", datetime.now(UTC), "deleted"))
            try:
                self._write(deleted)
            except OSError as error:
                if not is_full(error):
                    raise
                self._folder.mark_deleted(name, deleted.versions[-1].at)
                self._show()
            return record.current.digest

    def keep_default(self, default: Mapping[str, str]) -> None:
        """As `Registry.keep_default`."""
        with self._locked(LOCK_SECONDS):
            for reference, digest in default.items():
                if self._catalogue.resolve(reference).digest != digest:
                    raise UnknownInterventionError(
                        reference,
                        f'The intervention "{reference}" has just been replaced by another.',
                    )
            self._leases.keep(default)
            for digest in default.values():
                self._stored.pin(digest)

    def look(self) -> None:
        """Show what other servers have changed.

        Raises:
            OSError: the folder cannot be read.
            RegistryError: the registry is closed.
        """
        self.check_open()
        if self._reader.changed():
            with suppress(RegistryBusyError), self._locked(_LOOK_SECONDS):
                pass  # locking it reads it

    def beat(self) -> None:
        """Renew the lease, and remove what nothing needs any more.

        Raises:
            OSError: the folder cannot be read, or the lease cannot be written.
            RegistryError: the registry is closed.
        """
        self._folder.repair()
        try:
            with self._locked(_LOOK_SECONDS):
                self._leases.beat(self._stored.show(self._found.catalogue))
                self._collect()
        except RegistryBusyError:  # the lease lives on, however long another server takes
            self._leases.touch()

    def remove_soon(self) -> None:
        """Have another thread remove what nothing needs any more; does not wait for it."""
        # One that has not begun yet does it all. After close, others do.
        if self._removal is None or self._removal.running() or self._removal.done():
            with suppress(RuntimeError):
                self._removal = self._remover.submit(self._remove)

    @property
    def _catalogue(self) -> Catalogue:
        return self._stored.catalogue

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """Nobody else changes the folder within the block, and what it holds is shown."""
        if not self._using.acquire(timeout=seconds):
            raise RegistryBusyError("Another change of the registry takes long; try again later.")
        try:
            self.check_open()
            with self._folder.locked(seconds):
                self._refresh()
                yield
        finally:
            self._using.release()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The same for a change; what the block leaves unneeded goes after it."""
        with disk_errors(), self._locked(LOCK_SECONDS):
            try:
                yield
            finally:
                self._collect()

    def _refresh(self) -> frozenset[str]:
        """Show what the folder holds; returns the digests that are pinned."""
        if self._reader.changed():
            self._folder.names_changed()
            self._found = self._reader.read()
        return self._stored.show(self._found.catalogue)

    def _point(self, name: str, digest: str) -> bool:
        """Point a name to a stored object; returns whether it did not before."""
        record = self._catalogue.records.get(name)
        if record is not None and record.current and record.current.digest == digest:
            self._folder.sync_names()  # where an earlier try may have failed
            self._show()
            return False
        self._write(_followed(name, record, Version(digest, datetime.now(UTC), "stored")))
        return True

    def _write(self, record: NameRecord) -> None:
        """Write a name's record, and show it.

        Raises:
            OSError: nothing has changed.
            RegistryDiskError: the record is visible, but may not be durable.
        """
        damaged = record.name + RECORD_SUFFIX in self._catalogue.damaged_records
        copy = self._folder.copy_record(record.name) if damaged else None
        try:
            self._folder.write_record(record.name, record_bytes(record))
        except OSError:
            if copy is not None:
                self._folder.remove_temporary(copy)
            raise
        self._show()

    def _show(self) -> None:
        """Show the names that the folder has by now, once they are durable if they can be."""
        with disk_errors(visible=True):
            try:
                self._folder.sync_names()
            finally:
                self._found = self._reader.read()
                self._stored.show(self._found.catalogue)

    def _remove_new(self, digest: str) -> None:
        """Remove an object that came with a change that has failed: no other server knows it."""
        if not self._catalogue.refers_to(digest):
            self._remove_object(digest)

    def _remove(self) -> None:
        if self._closed:
            return
        try:
            with suppress(RegistryBusyError), self._locked(LOCK_SECONDS):  # a beat comes soon
                self._collect()
        except Exception:
            _logger.exception("what the registry no longer needs could not be removed")

    def _collect(self) -> None:
        """Remove what neither a name nor any server needs.

        What the disk refuses now is tried again later.
        """
        try:
            others = self._leases.others()
            self._folder.remove_leftovers({self._leases.own.server, *others})
            # A change may have been made whose outcome could not be read.
            pinned = self._refresh()
            catalogue = self._found.catalogue
            unneeded = [
                digest
                for digest in catalogue.objects
                if not catalogue.needs(digest) and digest not in pinned
            ]
            ripe = self._marks.ripe(catalogue.times_stored(unneeded), others)
            for digest in ripe:
                self._remove_object(digest)
            if ripe:
                self._found = self._reader.read()
            self._write_marked()
        except OSError as error:
            _logger.warning("what the registry no longer needs stays for now: %s", error)

    def _remove_object(self, digest: str) -> None:
        try:
            self._folder.remove_object(digest)
        except OSError as error:
            _logger.warning("cannot be removed, tried again later: %s: %s", digest, error)

    def _write_marked(self) -> None:
        """Write the records of names whose deletion had no room for one."""
        for name in sorted(self._found.marked):
            self._folder.write_record(name, record_bytes(self._catalogue.records[name]))
            self._folder.sync_names()
            self._folder.remove_mark(name)
        if self._found.marked:
            self._found = self._reader.read()


def _followed(name: str, record: NameRecord | None, version: Version) -> NameRecord:
    return NameRecord(name, (version,)) if record is None else record.followed_by(version)
