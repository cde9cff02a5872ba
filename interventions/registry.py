"""Stores interventions as content-addressed objects, and names that point to them.

An object's bytes are made durable before the record of the name that points to it, so a crash at
any byte leaves the old state or the new one. An object without a record is removed by the next
change.

Several servers may open one folder. A server sees the changes of the others after a `poll`.

`resolve`, `entries`, `known`, `problem`, `shapes`, `pin` and `unpin` never wait for the
disk, so an event loop may call them; all other methods belong on a thread.
"""

import errno
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from interventions.artifact import Artifact, artifact_digest, read_artifact, read_summary
from interventions.catalogue import DIGEST_PREFIX, Catalogue, Entry
from interventions.changes import RegistryChanges
from interventions.errors import (
    DamagedInterventionError,
    InvalidNameError,
    RegistryBusyError,
    RegistryError,
    RegistryUnreadableError,
    disk_errors,
)
from interventions.folder import RegistryFolder
from interventions.header import (
    DEFAULT_LIMITS,
    ArtifactError,
    ArtifactLimits,
    UnreadableArtifactError,
)
from interventions.layout import Shapes
from interventions.leases import Leases
from interventions.manifest import NAME_PATTERN
from interventions.pins import PinnedCatalogue
from interventions.reader import FolderReader
from interventions.staged_upload import StagedUpload

_COPIED_AT_ONCE: Final = 1 << 20
_HANGING_AFTER_SECONDS: Final = 10.0  # a poll that takes longer is reported as a problem

_logger = logging.getLogger(__name__)


class Registry:
    """A registry's folder, which other servers may have open too. Safe to use from several threads.

    Its owner must call `heartbeat` and `poll` regularly, as `interventions.watch` does.
    """

    def __init__(
        self,
        root: Path,
        limits: ArtifactLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the folder, or create it.

        Temporary files of ended servers are removed. Damaged files are logged and left as they are.

        Args:
            limits: the limits of an artifact.
            clock: returns monotonic seconds, by which other servers' leases get old.

        Raises:
            RegistryError: the folder cannot be used, its file system does not suit, or another
                server keeps it locked.
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lease, and hold nothing any more. May be called again."""
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
        """Store a staged file, from which `artifact` was read, and point the name to it.

        Returns:
            The name's entry, and whether the name has changed: False if it pointed to these bytes
            already.

        Raises:
            InvalidNameError: interventions may not have this name.
            NameInUseError: a server's default steering needs the name as it is.
            RegistryBusyError: another server keeps the registry locked.
            RegistryDiskError: the disk is full, fails, or gives back other bytes than the
                artifact's; nothing has changed, unless the error's `visible` is True.
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
            InvalidNameError, RegistryDiskError: see `commit`.
        """
        read_summary(path, self._limits)  # refuses a faulty file before it is copied
        with self.stage() as staged:
            with path.open("rb") as source:
                while chunk := source.read(_COPIED_AT_ONCE):
                    staged.write(chunk)
            artifact = read_artifact(staged.path, self._limits)
            chosen = artifact.manifest.name if name is None else name
            entry, _ = self.commit(staged, artifact, chosen)
        return entry

    def resolve(self, reference: str) -> Entry:
        """Return the intervention that a name, or `sha256:<digest>`, refers to.

        A digest is found as long as it is in the history of a name that is not deleted.

        Raises:
            UnknownInterventionError: there is none.
            DamagedInterventionError: its files are damaged or missing.
        """
        return self._catalogue.resolve(reference)

    def entries(self) -> list[Entry]:
        """Return every name's intervention, sorted by name, without deleted and damaged ones."""
        return self._catalogue.entries()

    def known(self, name: str) -> bool:
        """Tell whether the name was ever stored, even if it was deleted or is damaged now."""
        return self._catalogue.known(name)

    def delete(self, name: str) -> str:
        """Delete a name, even on a full disk; the bytes go when no server needs them any more.

        Returns:
            The digest that the name pointed to.

        Raises:
            UnknownInterventionError: the name is not stored, or deleted already.
            DamagedInterventionError: its record is damaged, and is left as it is.
            NameInUseError: a server's default steering needs the name.
            RegistryBusyError: another server keeps the registry locked.
            RegistryDiskError: the disk fails; nothing has changed, unless the error's `visible` is
                True.
        """
        return self._changes.delete(name)

    def keep_default(self, default: Mapping[str, str]) -> None:
        """Protect a default steering's names and artifacts from all servers until this one closes.

        Args:
            default: the digest of each name or `sha256:<digest>` that the operator gave.

        Raises:
            UnknownInterventionError: a name points to another digest now; nothing is protected.
            RegistryBusyError, RegistryDiskError: see `commit`.
        """
        with disk_errors():
            self._changes.keep_default(default)

    def poll(self) -> None:
        """Read what other servers have changed; `problem` tells if that fails."""
        self._looking_since = self._clock()
        try:
            self._changes.poll()
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

    def heartbeat(self) -> None:
        """Renew the lease, from which other servers know what this one needs."""
        try:
            self._changes.heartbeat()
        except OSError as error:
            _logger.warning("the registry's lease is not renewed, tried again later: %s", error)

    def problem(self) -> str | None:
        """Say in a sentence why the last poll could not read the folder; None if it could."""
        since = self._looking_since
        if since is not None and self._clock() - since > _HANGING_AFTER_SECONDS:
            return f"The registry's folder has not answered for {self._clock() - since:.0f} s."
        failure = self._failure
        return None if failure is None else str(failure)

    def pin(self, digest: str) -> None:
        """Keep an artifact's bytes until as many calls of `unpin`, even if its names are deleted.

        Raises:
            UnknownInterventionError: the bytes are not stored.
        """
        self._stored.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; a thread removes bytes that nothing needs any more."""
        if self._stored.unpin(digest):
            self._changes.schedule_removal()

    def path(self, digest: str) -> Path:
        """Return the path of an artifact, stored or not. Pin its digest while reading it."""
        return self._folder.object_path(digest)

    def shapes(self, digest: str) -> Shapes:
        """Return the shapes of an artifact's tensors from memory; raise as `pin` does."""
        return self._catalogue.summary(digest).shapes

    def load(self, digest: str) -> Artifact:
        """Read an artifact with every check, also of its digest.

        Raises:
            UnknownInterventionError: the bytes are not stored.
            DamagedInterventionError: the bytes have changed.
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
