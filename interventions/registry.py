"""Stored interventions: content-addressed objects, and names that point to them.

First an object's bytes are made durable, then the record of the name that points to it. So a crash
at any byte leaves the old state or the new one; an object that no record refers to yet is dropped
by whoever changes the registry next.

Any number of servers may open one folder. What one changes the others see when they look.

What only reads (`resolve`, `get`, `entries`, `history`, `shapes`, …), `pin` and `unpin` never wait
for a disk, nor for whoever does: an event loop may call them. All else belongs on a thread.
"""

import errno
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from interventions.artifact import (
    DEFAULT_LIMITS,
    Artifact,
    ArtifactError,
    ArtifactLimits,
    UnreadableArtifactError,
    artifact_digest,
    read_artifact,
    read_summary,
)
from interventions.catalogue import DIGEST_PREFIX, Catalogue, Damage, Entry
from interventions.changes import RegistryChanges
from interventions.errors import (
    DamagedInterventionError,
    InvalidNameError,
    NameInUseError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryError,
    RegistryUnreadableError,
    UnknownInterventionError,
    disk_errors,
)
from interventions.folder import RegistryFolder
from interventions.layout import Shapes
from interventions.leases import Leases
from interventions.manifest import NAME_PATTERN
from interventions.name_records import Version
from interventions.pins import PinnedCatalogue
from interventions.reader import FolderReader
from interventions.staged_upload import StagedUpload

__all__ = [
    "DIGEST_PREFIX",
    "Damage",
    "DamagedInterventionError",
    "Entry",
    "InvalidNameError",
    "NameInUseError",
    "Registry",
    "RegistryBusyError",
    "RegistryDiskError",
    "RegistryError",
    "RegistryUnreadableError",
    "StagedUpload",
    "UnknownInterventionError",
    "Version",
]

_COPIED_AT_ONCE: Final = 1 << 20
_HANGS_SECONDS: Final = 10.0  # of a look at the folder, until that is told

_logger = logging.getLogger(__name__)


class Registry:
    """A registry's folder, which other servers may have open too. Safe to use from several threads.

    Its lease must be renewed and the folder looked at, as `interventions.watch` does, for the
    others to keep what it holds, and for it to see what they change.
    """

    def __init__(
        self,
        root: Path,
        limits: ArtifactLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the folder, creating it where it does not exist.

        Leftovers of servers that live no more are removed. A damaged file is left as it is and
        logged.

        Args:
            root: the folder.
            limits: what an artifact may be.
            clock: seconds that only grow; by it, other servers' leases become old.

        Raises:
            RegistryError: it cannot be used, does not suit, or another server keeps it locked.
        """
        self._limits = limits
        self._clock = clock
        self._failure: RegistryUnreadableError | None = None
        self._looking_since: float | None = None
        server = secrets.token_hex(8)
        self._folder = RegistryFolder(root, server)
        self._stored = PinnedCatalogue(Catalogue({}, {}, {}, {}))
        leases = Leases(self._folder.leases, server, clock)
        try:
            self._folder.make()
            with self._folder.locked(), ExitStack() as failing:
                self._folder.check_file_system()
                failing.callback(leases.close)
                leases.open()
                reader = FolderReader(self._folder.objects, self._folder.names, limits)
                self._changes = RegistryChanges(self._folder, reader, leases, self._stored)
                failing.pop_all()
        except RegistryBusyError as error:
            raise RegistryError(f"The registry {root} cannot be opened: {error}") from error
        except OSError as error:
            raise RegistryError(f"The registry {root} cannot be opened: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease up: nothing is held any more. Harmless when closed before."""
        self._changes.close()

    def stage(self) -> StagedUpload:
        """Create a temporary file to write an upload to, before it is checked and committed.

        Raises:
            RegistryDiskError: the disk is full, or fails.
        """
        self._changes.check_open()
        folder = self._folder
        return StagedUpload(folder.new_temporary(), self._limits.max_bytes, folder.remove_temporary)

    def commit(self, staged: StagedUpload, artifact: Artifact, name: str) -> tuple[Entry, bool]:
        """Store a staged file, of which `artifact` was read, and point the name to it.

        Returns:
            The name's entry, and whether anything is new: False where the name points to these
            bytes already.

        Raises:
            InvalidNameError: the name is not one that an intervention may have.
            NameInUseError: a server's default steering needs the name as it is.
            RegistryBusyError: another server is changing the registry, and does not end.
            RegistryDiskError: the disk is full, or fails, or gives back other bytes than those of
                the artifact; the name points to what it did before, unless the error says that the
                change is visible.
        """
        if not NAME_PATTERN.match(name):
            raise InvalidNameError(name)
        staged.finish()
        digest = artifact.digest
        with disk_errors():
            if artifact_digest(staged.path) != digest:
                raise OSError(errno.EIO, "the staged bytes are not those of the artifact")
        return self._changes.store(staged, digest, name)

    def add(self, path: Path, name: str | None = None) -> Entry:
        """Store a local file under a name, by default the one in its manifest.

        Raises:
            ArtifactError: the file is not an artifact.
            InvalidNameError, RegistryDiskError: as for `commit`.
        """
        read_summary(path, self._limits)  # so that nothing hopeless is copied
        with self.stage() as staged:
            with path.open("rb") as source:
                while chunk := source.read(_COPIED_AT_ONCE):
                    staged.write(chunk)
            artifact = read_artifact(staged.path, self._limits)
            chosen = artifact.manifest.name if name is None else name
            entry, _ = self.commit(staged, artifact, chosen)
        return entry

    def resolve(self, reference: str) -> Entry:
        """The intervention that a name, or `sha256:<digest>`, refers to.

        A digest is found as long as it is in the history of a name that is not deleted.

        Raises:
            UnknownInterventionError: there is none.
            DamagedInterventionError: there is one, but its files are damaged or missing.
        """
        return self._catalogue.resolve(reference)

    def get(self, name: str) -> Entry:
        """What a name points to; raises as `resolve` does."""
        return self._catalogue.get(name)

    def history(self, name: str) -> tuple[Version, ...]:
        """All that happened to a name, oldest first, of a deleted one too.

        Raises:
            UnknownInterventionError: the name was never stored.
        """
        return self._catalogue.history(name)

    def names_of(self, digest: str) -> frozenset[str]:
        """The names that point to a digest; if none does, those that once did, and still live."""
        return self._catalogue.names_of(digest)

    def entries(self) -> list[Entry]:
        """What every name points to, sorted by name; without deleted and damaged ones."""
        return self._catalogue.entries()

    def damaged(self) -> tuple[Damage, ...]:
        """The files that could not be understood, or were missing, when the folder was opened."""
        return self._catalogue.damaged()

    def known(self, name: str) -> bool:
        """Whether the name was ever stored, also if it is deleted or damaged by now."""
        return self._catalogue.known(name)

    def delete(self, name: str) -> str:
        """Delete a name with its history; the bytes go when no server needs them any more.

        A full disk does not prevent it.

        Returns:
            The digest that the name pointed to.

        Raises:
            UnknownInterventionError: the name is not stored, or deleted already.
            DamagedInterventionError: its record cannot be understood, so it is not touched.
            NameInUseError: a server's default steering needs the name.
            RegistryBusyError: another server is changing the registry, and does not end.
            RegistryDiskError: the disk fails; the name is as it was, unless the error says that
                the change is visible.
        """
        return self._changes.delete(name)

    def keep_default(self, default: Mapping[str, str]) -> None:
        """Keep what a default steering needs, at every server, until this one closes.

        Args:
            default: the names and `sha256:<digest>`s that it was given by, and their digests.

        Raises:
            UnknownInterventionError: a reference means its digest no more. Nothing is kept then.
            RegistryBusyError, RegistryDiskError: as for `commit`.
        """
        with disk_errors():
            self._changes.keep_default(default)

    def look(self) -> None:
        """See what other servers have changed; `problem` says whether that was possible.

        Raises:
            RegistryError: the registry is closed.
        """
        self._looking_since = self._clock()
        try:
            self._changes.look()
        except OSError as error:
            if self._failure is None:
                _logger.error("the registry's folder cannot be read: %s", error)
            self._failure = RegistryUnreadableError(error)
        else:
            if self._failure is not None:
                _logger.warning("the registry's folder can be read again")
            self._failure = None
        finally:
            self._looking_since = None

    def beat(self) -> None:
        """Renew the lease, by which other servers know what this one needs.

        Raises:
            RegistryError: the registry is closed.
        """
        try:
            self._changes.beat()
        except OSError as error:
            _logger.warning("the registry's lease is not renewed, tried again later: %s", error)

    def problem(self) -> str | None:
        """Say in a sentence why the folder cannot be read now; None if it can. From memory."""
        since = self._looking_since
        if since is not None and self._clock() - since > _HANGS_SECONDS:
            return f"The registry's folder has not answered for {self._clock() - since:.0f} s."
        failure = self._failure
        return None if failure is None else str(failure)

    def pin(self, digest: str) -> None:
        """Keep an artifact's bytes until as many calls of `unpin`, whatever is deleted.

        Raises:
            UnknownInterventionError: the bytes are not stored (any more).
        """
        self._stored.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; bytes that nothing needs any more are removed soon, by another thread."""
        if self._stored.unpin(digest):
            self._changes.remove_soon()

    def path(self, digest: str) -> Path:
        """Where an artifact's bytes lie, or would lie. Pin the digest while reading them."""
        return self._folder.object_path(digest)

    def shapes(self, digest: str) -> Shapes:
        """The shapes of an artifact's tensors, from memory; raises as `pin` does."""
        return self._catalogue.summary(digest).shapes

    def load(self, digest: str) -> Artifact:
        """Read an artifact with every check, also that its bytes are still those of its digest.

        Raises:
            UnknownInterventionError: the bytes are not stored (any more).
            DamagedInterventionError: they are, but changed.
            RegistryUnreadableError: the folder cannot be read now.
        """
        self._catalogue.summary(digest)
        reference = DIGEST_PREFIX + digest
        try:
            artifact = read_artifact(self.path(digest), self._limits)
        except (ArtifactError, OSError) as error:
            if isinstance(error, UnreadableArtifactError):
                self.check_readable()
            raise DamagedInterventionError(reference, str(error)) from error
        if artifact.digest != digest:
            raise DamagedInterventionError(reference, "its bytes have changed.")
        return artifact

    def check_readable(self) -> None:
        """Raise RegistryUnreadableError if the folder cannot be read now."""
        try:
            self._folder.names.stat()
        except OSError as error:
            raise RegistryUnreadableError(error) from error

    @property
    def _catalogue(self) -> Catalogue:
        return self._stored.catalogue
