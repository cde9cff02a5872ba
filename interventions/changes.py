"""Makes all changes of a registry, one at a time: first on the disk, then in memory."""

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
from interventions.reader import FolderContents, FolderReader
from interventions.staged_upload import StagedUpload

_POLL_SECONDS: Final = 1.0  # longest wait of a poll for the lock; the next poll comes soon

_logger = logging.getLogger(__name__)


class RegistryChanges:
    """Changes a folder that other servers change too, and updates the catalogue in memory.

    Each change holds the folder's lock, and begins by reading what other servers have changed. A
    change that fails leaves the folder in the old state or in the new one.
    """

    def __init__(
        self, folder: RegistryFolder, reader: FolderReader, leases: Leases, stored: PinnedCatalogue
    ) -> None:
        """Read the folder, and remove objects that nothing needs. The caller holds the lock."""
        self._folder = folder
        self._reader = reader
        self._leases = leases
        self._stored = stored
        self._marks = Marks()
        self._thread_lock = threading.Lock()  # the event loop never takes it
        self._closed = False
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._removal: Future[None] | None = None  # the last that was scheduled
        self._contents: FolderContents = reader.read()
        self._remove_unneeded()

    def close(self) -> None:
        """Wait for the running change, take no more changes, and give up the lease.

        If a change does not end, because its disk hangs, the lease ends with this process.
        """
        self._remover.shutdown(wait=False)
        if not self._thread_lock.acquire(timeout=LOCK_SECONDS):
            self._closed = True
            _logger.warning("the lease is not removed, as a change of the registry does not end")
            return
        try:
            self._closed = True
            self._leases.close()
        except OSError as error:
            _logger.warning("the lease cannot be removed: %s", error)
        finally:
            self._thread_lock.release()

    def check_open(self) -> None:
        """Raise RegistryError if the registry is closed."""
        if self._closed:
            raise RegistryError("The registry is closed.")

    def store(self, staged: StagedUpload, digest: str, name: str) -> tuple[Entry, bool]:
        """Move checked and durable bytes to their object's path, and point the name to them.

        Returns and raises as `Registry.commit`.
        """
        with self._changing():
            check_default(self._leases, self._catalogue, name, digest)
            was_stored = digest in self._contents.catalogue.objects
            try:
                # A stored object has equal bytes; a damaged one is repaired by this.
                self._folder.move_object(staged.path, digest)
                changed = self._point_name(name, digest)
            except OSError:  # a RegistryDiskError would mean that the name has changed already
                if not was_stored and not self._catalogue.refers_to(digest):
                    self._remove_object(digest)
                raise
            try:
                return self._catalogue.get(name), changed
            except DamagedInterventionError as error:
                lost = OSError(errno.EIO, "What was just written cannot be read back")
                raise RegistryDiskError(lost, visible=True) from error

    def delete(self, name: str) -> str:
        with self._changing():
            record = self._catalogue.records.get(name)
            if record is None or record.current is None:
                self._catalogue.get(name)  # raises if the record is damaged
                raise UnknownInterventionError(name)
            check_default(self._leases, self._catalogue, name, None)
            deleted = _record_with(name, record, Version("", datetime.now(UTC), "deleted"))
            try:
                self._write(deleted)
            except OSError as error:
                if not is_full(error):
                    raise
                self._folder.mark_deleted(name, deleted.versions[-1].at)
                self._publish_names()
            return record.current.digest

    def keep_default(self, default: Mapping[str, str]) -> None:
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

    def poll(self) -> None:
        """Read what other servers have changed.

        Raises:
            OSError: the folder cannot be read.
            RegistryError: the registry is closed.
        """
        self.check_open()
        if self._reader.changed():
            with suppress(RegistryBusyError), self._locked(_POLL_SECONDS):
                pass  # `_locked` has read the folder

    def heartbeat(self) -> None:
        """Renew the lease, and remove objects that nothing needs any more.

        Raises:
            OSError: the folder cannot be read, or the lease cannot be written.
            RegistryError: the registry is closed.
        """
        self._folder.repair()
        try:
            with self._locked(_POLL_SECONDS):
                self._leases.heartbeat(self._stored.replace(self._contents.catalogue))
                self._remove_unneeded()
        except RegistryBusyError:  # keeps the lease alive while another server holds the lock
            self._leases.touch()

    def schedule_removal(self) -> None:
        """Have a thread remove objects that nothing needs any more, and return at once."""
        # A scheduled removal that has not begun will see these objects too.
        if self._removal is None or self._removal.running() or self._removal.done():
            with suppress(RuntimeError):  # after `close`, other servers remove them
                self._removal = self._remover.submit(self._remove_in_background)

    @property
    def _catalogue(self) -> Catalogue:
        return self._stored.catalogue

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """Hold the locks during the block; the catalogue is up to date when it begins."""
        if not self._thread_lock.acquire(timeout=seconds):
            raise RegistryBusyError("Another change of the registry takes long; try again later.")
        try:
            self.check_open()
            with self._folder.locked(seconds):
                self._refresh()
                yield
        finally:
            self._thread_lock.release()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the locks for a change, and remove unneeded objects after it."""
        with disk_errors(), self._locked(LOCK_SECONDS):
            try:
                yield
            finally:
                self._remove_unneeded()

    def _refresh(self) -> frozenset[str]:
        """Update the catalogue from the folder; return the pinned digests."""
        if self._reader.changed():
            self._folder.mark_names_unsynced()
            self._contents = self._reader.read()
        return self._stored.replace(self._contents.catalogue)

    def _point_name(self, name: str, digest: str) -> bool:
        """Point a name to a stored object; return False if it points there already."""
        record = self._catalogue.records.get(name)
        if record is not None and record.current and record.current.digest == digest:
            self._folder.sync_names()  # an earlier try may have failed
            self._publish_names()
            return False
        self._write(_record_with(name, record, Version(digest, datetime.now(UTC), "stored")))
        return True

    def _write(self, record: NameRecord) -> None:
        """Write a name's record, and update the catalogue.

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
        self._publish_names()

    def _publish_names(self) -> None:
        """Make the names durable, and update the catalogue even if that fails."""
        with disk_errors(visible=True):
            try:
                self._folder.sync_names()
            finally:
                self._contents = self._reader.read()
                self._stored.replace(self._contents.catalogue)

    def _remove_in_background(self) -> None:
        if self._closed:
            return
        try:
            with suppress(RegistryBusyError), self._locked(LOCK_SECONDS):  # a heartbeat comes soon
                self._remove_unneeded()
        except Exception:
            _logger.exception("what the registry no longer needs could not be removed")

    def _remove_unneeded(self) -> None:
        """Remove objects that neither a name nor any server needs; log failures for a later try."""
        try:
            others = self._leases.others()
            self._folder.remove_leftovers({self._leases.own.server, *others})
            # The outcome of an earlier change may not have been read.
            pinned = self._refresh()
            catalogue = self._contents.catalogue
            unneeded = [
                digest
                for digest in catalogue.objects
                if not catalogue.needs(digest) and digest not in pinned
            ]
            removable = self._marks.removable(catalogue.times_stored(unneeded), others)
            for digest in removable:
                self._remove_object(digest)
            if removable:
                self._contents = self._reader.read()
            self._write_marked()
        except OSError as error:
            _logger.warning("unneeded objects could not be removed yet: %s", error)

    def _remove_object(self, digest: str) -> None:
        try:
            self._folder.remove_object(digest)
        except OSError as error:
            _logger.warning("cannot be removed, tried again later: %s: %s", digest, error)

    def _write_marked(self) -> None:
        """Write the records of names that were deleted while the disk was full."""
        for name in sorted(self._contents.marked):
            self._folder.write_record(name, record_bytes(self._catalogue.records[name]))
            self._folder.sync_names()
            self._folder.remove_mark(name)
        if self._contents.marked:
            self._contents = self._reader.read()


def _record_with(name: str, record: NameRecord | None, version: Version) -> NameRecord:
    return NameRecord(name, (version,)) if record is None else record.with_version(version)
