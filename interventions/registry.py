"""Stored interventions: content-addressed objects, and names that point to them.

First an object's bytes are made durable, then the record of the name that points to it. So a crash
at any byte leaves the old state or the new one; an object that no record refers to yet is dropped
at the next start.

What only reads (`resolve`, `get`, `entries`, `history`, `shapes`, …), `pin` and `unpin` never wait
for a disk, nor for whoever does: an event loop may call them. All else belongs on a thread.
"""

from pathlib import Path
from types import TracebackType
from typing import Final, Self

from interventions.artifact import (
    DEFAULT_LIMITS,
    Artifact,
    ArtifactError,
    ArtifactLimits,
    Summary,
    artifact_digest,
    read_artifact,
    read_summary,
)
from interventions.catalogue import DIGEST_PREFIX, Catalogue, Damage, Entry
from interventions.changes import RegistryChanges
from interventions.errors import (
    DamagedInterventionError,
    InvalidNameError,
    RegistryDiskError,
    RegistryError,
    UnknownInterventionError,
    disk_errors,
)
from interventions.folder import RegistryFolder
from interventions.layout import Shapes, shapes_of
from interventions.manifest import NAME_PATTERN
from interventions.pins import PinnedCatalogue
from interventions.records import Version
from interventions.recovery import read_catalogue
from interventions.staging import StagedUpload

__all__ = [
    "DIGEST_PREFIX",
    "Damage",
    "DamagedInterventionError",
    "Entry",
    "InvalidNameError",
    "Registry",
    "RegistryDiskError",
    "RegistryError",
    "StagedUpload",
    "UnknownInterventionError",
    "Version",
]

_COPIED_AT_ONCE: Final = 1 << 20


class Registry:
    """A registry's folder, opened by this process alone. Safe to use from several threads."""

    def __init__(self, root: Path, limits: ArtifactLimits = DEFAULT_LIMITS) -> None:
        """Open the folder, creating it where it does not exist.

        Leftovers of a crash are removed. A damaged file is left as it is and logged.

        Raises:
            RegistryError: another process has the folder open, or it cannot be used.
        """
        self._limits = limits
        self._folder = RegistryFolder(root)
        try:
            self._folder.lock()
            self._folder.prepare()
            catalogue, marked = read_catalogue(self._folder.objects, self._folder.names, limits)
        except BlockingIOError as error:
            raise RegistryError(f"Another process has the registry {root} open.") from error
        except OSError as error:
            self._folder.unlock()
            raise RegistryError(f"The registry {root} cannot be opened: {error}.") from error
        self._stored = PinnedCatalogue(catalogue)
        self._changes = RegistryChanges(self._folder, self._stored, marked)

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
        """Let another process open the folder. Harmless when closed before."""
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
            RegistryDiskError: the disk is full, or fails; the name points to what it did before,
                unless the error says that the change is visible.
            RegistryError: the staged bytes are not those of the artifact.
        """
        if not NAME_PATTERN.match(name):
            raise InvalidNameError(name)
        staged.finish()
        digest = artifact.digest
        with disk_errors():
            if artifact_digest(staged.path) != digest:
                raise RegistryError("The staged bytes are not those of the artifact to commit.")
        summary = Summary(artifact.size, artifact.manifest, shapes_of(artifact.parameters))
        return self._changes.store(staged, digest, summary, name)

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

    def delete(self, name: str) -> None:
        """Delete a name with its history; the bytes go when nothing else needs them.

        A full disk does not prevent it.

        Raises:
            UnknownInterventionError: the name is not stored, or deleted already.
            DamagedInterventionError: its record cannot be understood, so it is not touched.
            RegistryDiskError: the disk fails; the name is as it was, unless the error says that
                the change is visible.
        """
        self._changes.delete(name)

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
        """
        self._catalogue.summary(digest)
        reference = DIGEST_PREFIX + digest
        try:
            artifact = read_artifact(self.path(digest), self._limits)
        except (ArtifactError, OSError) as error:
            raise DamagedInterventionError(reference, str(error)) from error
        if artifact.digest != digest:
            raise DamagedInterventionError(reference, "its bytes have changed.")
        return artifact

    @property
    def _catalogue(self) -> Catalogue:
        return self._stored.catalogue
