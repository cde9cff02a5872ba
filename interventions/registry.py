"""The folder that keeps artifacts: content-addressed objects, and names that point to them.

    objects/<first two hex digits>/<digest>.safetensors   names/<name>.json   tmp/   lock

Every change is written to a temporary file, synced, renamed, and the folder synced: first the
object, then the record of the name. So a crash at any byte leaves the old state or the new one; an
object that no record refers to yet is dropped at the next start.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
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
from interventions.catalogue import (
    DIGEST_PREFIX,
    OBJECT_SUFFIX,
    RECORD_SUFFIX,
    Damage,
    DamagedInterventionError,
    Entry,
    InvalidNameError,
    RegistryError,
    UnknownInterventionError,
)
from interventions.layout import Shapes, shapes_of
from interventions.manifest import NAME_PATTERN
from interventions.records import NameRecord, Version, record_bytes
from interventions.recovery import read_catalogue, remove_stale
from interventions.staging import StagedUpload
from interventions.storage import (
    lock_exclusively,
    make_directory,
    publish,
    temporary_path,
    write_durably,
)

__all__ = [
    "DIGEST_PREFIX",
    "Damage",
    "DamagedInterventionError",
    "Entry",
    "InvalidNameError",
    "Registry",
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
        self._objects_folder, self._names_folder = root / "objects", root / "names"
        self._temporary_folder = root / "tmp"
        self._limits = limits
        self._lock = threading.RLock()
        self._pins: Counter[str] = Counter()
        self._lock_descriptor: int | None = None
        try:
            make_directory(root)
            self._lock_descriptor = lock_exclusively(root / "lock")
            self._read_folder()
        except BlockingIOError as error:
            raise RegistryError(f"Another process has the registry {root} open.") from error
        except OSError as error:
            self.close()
            raise RegistryError(f"The registry {root} cannot be opened: {error}.") from error

    def _read_folder(self) -> None:
        for folder in (self._objects_folder, self._names_folder, self._temporary_folder):
            make_directory(folder)
        remove_stale(self._temporary_folder)
        self._catalogue = read_catalogue(self._objects_folder, self._names_folder, self._limits)
        self._collect(tuple(self._catalogue.objects))

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
        with self._lock:
            if self._lock_descriptor is not None:
                os.close(self._lock_descriptor)
                self._lock_descriptor = None

    def stage(self) -> StagedUpload:
        """A temporary file to write an upload to, before it is checked and committed."""
        with self._lock:
            self._check_open()
            return StagedUpload(temporary_path(self._temporary_folder), self._limits.max_bytes)

    def commit(self, staged: StagedUpload, artifact: Artifact, name: str) -> tuple[Entry, bool]:
        """Store a staged file, of which `artifact` was read, and point the name to it.

        Returns:
            The name's entry, and whether anything is new: False where the name points to these
            bytes already.

        Raises:
            InvalidNameError: the name is not one that an intervention may have.
            RegistryError: the staged bytes are not those of the artifact.
            OSError: the disk is full, or fails; the name points to what it did before.
        """
        if not NAME_PATTERN.match(name):
            raise InvalidNameError(name)
        staged.finish()
        digest = artifact.digest
        if artifact_digest(staged.path) != digest:
            raise RegistryError("The staged bytes are not those of the artifact to commit.")
        summary = Summary(artifact.size, artifact.manifest, shapes_of(artifact.parameters))
        with self._lock:
            self._check_open()
            target = self.path(digest)
            make_directory(target.parent)
            # Even where it is stored already: equal bytes, and it heals a damaged object.
            publish(staged.path, target)
            self._catalogue.damaged_objects.pop(digest + OBJECT_SUFFIX, None)
            self._catalogue.objects[digest] = summary
            record = self._catalogue.records.get(name)
            if record is not None and record.current and record.current.digest == digest:
                return self.get(name), False
            self._append(name, Version(digest, datetime.now(UTC), "stored"))
            return self.get(name), True

    def add(self, path: Path, name: str | None = None) -> Entry:
        """Store a local file under a name, by default the one in its manifest.

        Raises:
            ArtifactError: the file is not an artifact.
            InvalidNameError, OSError: as for `commit`.
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
        with self._lock:
            return self._catalogue.resolve(reference)

    def get(self, name: str) -> Entry:
        """What a name points to; raises as `resolve` does."""
        with self._lock:
            return self._catalogue.get(name)

    def history(self, name: str) -> tuple[Version, ...]:
        """All that happened to a name, oldest first, of a deleted one too.

        Raises:
            UnknownInterventionError: the name was never stored.
        """
        with self._lock:
            return self._catalogue.history(name)

    def entries(self) -> list[Entry]:
        """What every name points to, sorted by name; without deleted and damaged ones."""
        with self._lock:
            return self._catalogue.entries()

    def damaged(self) -> tuple[Damage, ...]:
        """The files that could not be understood, or were missing, when the folder was opened."""
        with self._lock:
            return self._catalogue.damaged()

    def known(self, name: str) -> bool:
        """Whether the name was ever stored, also if it is deleted or damaged by now."""
        with self._lock:
            return self._catalogue.known(name)

    def delete(self, name: str) -> None:
        """Delete a name with its history; the bytes go when nothing else needs them.

        Raises:
            UnknownInterventionError: the name is not stored, or deleted already.
            DamagedInterventionError: its record cannot be understood, so it is not touched.
        """
        with self._lock:
            self._check_open()
            record = self._catalogue.records.get(name)
            if record is None or record.current is None:
                self.get(name)  # raises, saying which
                return
            self._append(name, Version("", datetime.now(UTC), "deleted"))
            self._collect(version.digest for version in record.available)

    def pin(self, digest: str) -> None:
        """Keep an artifact's bytes until as many calls of `unpin`, whatever is deleted.

        Raises:
            UnknownInterventionError: the bytes are not stored (any more).
        """
        with self._lock:
            self._catalogue.summary(digest)
            self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; bytes that nothing needs any more are removed."""
        with self._lock:
            if not self._pins[digest]:
                raise RegistryError(f"{DIGEST_PREFIX}{digest} is not pinned.")
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]
                # After close, another process may own the folder.
                if self._lock_descriptor is not None:
                    self._collect((digest,))

    def path(self, digest: str) -> Path:
        """Where an artifact's bytes lie, or would lie. Pin the digest while reading them."""
        return self._objects_folder / digest[:2] / f"{digest}{OBJECT_SUFFIX}"

    def shapes(self, digest: str) -> Shapes:
        """The shapes of an artifact's tensors, from memory; raises as `pin` does."""
        with self._lock:
            return self._catalogue.summary(digest).shapes

    def load(self, digest: str) -> Artifact:
        """Read an artifact with every check, also that its bytes are still those of its digest.

        Raises:
            UnknownInterventionError: the bytes are not stored (any more).
            DamagedInterventionError: they are, but changed.
        """
        with self._lock:
            self._catalogue.summary(digest)
        reference = DIGEST_PREFIX + digest
        try:
            artifact = read_artifact(self.path(digest), self._limits)
        except (ArtifactError, OSError) as error:
            raise DamagedInterventionError(reference, str(error)) from error
        if artifact.digest != digest:
            raise DamagedInterventionError(reference, "its bytes have changed.")
        return artifact

    def _check_open(self) -> None:
        if self._lock_descriptor is None:
            raise RegistryError("The registry is closed.")

    def _append(self, name: str, version: Version) -> None:
        record = self._catalogue.records.get(name)
        target = self._names_folder / f"{name}{RECORD_SUFFIX}"
        if target.name in self._catalogue.damaged_records:
            self._keep_damaged(target)
        new = NameRecord(name, (version,)) if record is None else record.followed_by(version)
        write_durably(target, record_bytes(new), self._temporary_folder)
        self._catalogue.records[name] = new
        self._catalogue.damaged_records.pop(target.name, None)

    def _keep_damaged(self, record: Path) -> None:
        """Copy a record that cannot be understood beside itself, before it is replaced."""
        damage = self._catalogue.damaged_records[record.name]
        copy = temporary_path(self._names_folder).with_suffix(".damaged")
        copy = copy.with_name(record.name + copy.name)
        write_durably(copy, record.read_bytes(), self._temporary_folder)
        self._catalogue.damaged_records[copy.name] = Damage(copy, damage.reason)

    def _collect(self, digests: Iterable[str]) -> None:
        """Remove the bytes of those digests that no live name and no pin needs."""
        for digest in digests:
            if not self._pins[digest] and self._catalogue.can_be_dropped(digest):
                self.path(digest).unlink(missing_ok=True)
                del self._catalogue.objects[digest]
