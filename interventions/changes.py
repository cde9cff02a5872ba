"""Every change of a registry: one after the other, on the disk first, then for all to see."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from interventions.artifact import Summary
from interventions.catalogue import RECORD_SUFFIX, Catalogue, Damage, Entry
from interventions.errors import RegistryDiskError, RegistryError, disk_errors, is_full
from interventions.folder import RegistryFolder
from interventions.pins import PinnedCatalogue
from interventions.records import NameRecord, Version, record_bytes
from interventions.staging import StagedUpload

_logger = logging.getLogger(__name__)


class RegistryChanges:
    """Changes a locked folder and what is known of it in memory, together.

    If a change fails, both are as they were, or as they should be after it.
    """

    def __init__(
        self, folder: RegistryFolder, stored: PinnedCatalogue, marked: frozenset[str]
    ) -> None:
        """Remove what nothing needs.

        Args:
            folder: locked, and as `stored` says.
            stored: is changed by nobody else.
            marked: names whose deletion was marked in the folder, and not yet written.
        """
        self._folder = folder
        self._stored = stored
        self._marked = marked
        self._writing = threading.Lock()  # held over changes of the disk: never by an event loop
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._tidy()

    def close(self) -> None:
        """Wait for running changes, take no more, and unlock the folder."""
        self._remover.shutdown()
        with self._writing:
            self._folder.unlock()

    def check_open(self) -> None:
        """Raise RegistryError if the folder is not locked any more."""
        if not self._folder.locked:
            raise RegistryError("The registry is closed.")

    def store(
        self, staged: StagedUpload, digest: str, summary: Summary, name: str
    ) -> tuple[Entry, bool]:
        """Move checked and durable bytes to their place, and point the name to them.

        Returns and raises as `Registry.commit`.
        """
        with self._changing():
            was_stored = digest in self._catalogue.objects
            try:
                self._store_object(staged, digest, summary)
                changed = self._point(name, digest)
            except (OSError, RegistryDiskError):
                if not was_stored:
                    self._remove_unneeded(digest)
                raise
            return self._catalogue.get(name), changed

    def delete(self, name: str) -> None:
        """As `Registry.delete`."""
        with self._changing():
            record = self._catalogue.records.get(name)
            if record is None or record.current is None:
                self._catalogue.get(name)  # raises, saying which
                return
            deleted = _followed(name, record, Version("", datetime.now(UTC), "deleted"))
            try:
                self._write(deleted)
            except OSError as error:
                if not is_full(error):
                    raise
                self._mark_deleted(deleted)

    def remove_soon(self) -> None:
        """Have another thread remove what nothing needs any more; does not wait for it."""
        # After close, another process may own the folder; the next start removes it.
        with suppress(RuntimeError):
            self._remover.submit(self._remove)

    @property
    def _catalogue(self) -> Catalogue:
        return self._stored.catalogue

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody else changes anything within the block; what it leaves unneeded goes after it."""
        with self._writing:
            self.check_open()
            try:
                with disk_errors():
                    yield
            finally:
                self._tidy()

    def _store_object(self, staged: StagedUpload, digest: str, summary: Summary) -> None:
        # Even where it is stored already: equal bytes, and it heals a damaged object.
        self._folder.move_object(staged.path, digest)
        try:
            self._folder.sync_object(digest)
        finally:
            self._stored.replace(self._catalogue.with_object(digest, summary))

    def _point(self, name: str, digest: str) -> bool:
        """Point a name to a stored object; returns whether it did not before."""
        record = self._catalogue.records.get(name)
        if record is not None and record.current and record.current.digest == digest:
            self._folder.sync_names()  # where an earlier try may have failed
            return False
        self._write(_followed(name, record, Version(digest, datetime.now(UTC), "stored")))
        return True

    def _write(self, record: NameRecord) -> None:
        """Write a name's record, and show it.

        Raises:
            OSError: nothing has changed.
            RegistryDiskError: the record is visible, but may not be durable.
        """
        damage = self._catalogue.damaged_records.get(record.name + RECORD_SUFFIX)
        copy = None if damage is None else self._folder.copy_record(record.name)
        try:
            self._folder.write_record(record.name, record_bytes(record))
        except OSError:
            if copy is not None:
                self._folder.remove_temporary(copy)
            raise
        if damage is not None and copy is not None:
            kept = Damage(copy, damage.reason)
            self._stored.replace(self._catalogue.with_damaged_record(kept))
        self._show(record)

    def _mark_deleted(self, record: NameRecord) -> None:
        """Make a deletion visible without room for its record, which `_tidy` writes later."""
        self._folder.mark_deleted(record.name, record.versions[-1].at)
        self._marked |= {record.name}
        self._show(record)

    def _show(self, record: NameRecord) -> None:
        """Show the record that the folder has by now, once that is durable if it can be."""
        try:
            with disk_errors(visible=True):
                self._folder.sync_names()
        finally:
            self._stored.replace(self._catalogue.with_record(record))

    def _remove(self) -> None:
        with self._writing:
            try:
                self._tidy()
            except Exception:
                _logger.exception("what the registry no longer needs could not be removed")

    def _tidy(self) -> None:
        """Remove what nothing needs any more. What the disk refuses now is tried again later."""
        self._folder.remove_leftovers()
        self._remove_unneeded()
        self._write_marked()

    def _remove_unneeded(self, failed: str | None = None) -> None:
        """Remove objects; see `PinnedCatalogue.take_unneeded`."""
        for digest, summary in self._stored.take_unneeded(failed).items():
            try:
                self._folder.remove_object(digest)
            except OSError as error:
                _logger.warning("cannot be removed, tried again later: %s: %s", digest, error)
                self._stored.put_back(digest, summary)

    def _write_marked(self) -> None:
        """Write the records of names whose deletion had no room for one."""
        for name in sorted(self._marked):
            try:
                self._folder.write_record(name, record_bytes(self._catalogue.records[name]))
                self._folder.sync_names()
                self._folder.remove_mark(name)
            except OSError as error:
                _logger.warning("cannot be written, tried again later: %s: %s", name, error)
            else:
                self._marked -= {name}


def _followed(name: str, record: NameRecord | None, version: Version) -> NameRecord:
    return NameRecord(name, (version,)) if record is None else record.followed_by(version)
