"""An upload on its way into the registry."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from interventions.header import ArtifactError


class StagedUpload:
    """A temporary file inside the registry, gone at the end unless it was committed.

    For one thread at a time.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Create the file; the caller says where, and how large it may become."""
        self._path = path
        self._max_bytes = max_bytes
        self._size = 0
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    @property
    def path(self) -> Path:
        """Where the bytes written so far can be read."""
        return self._path

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            ArtifactError: the file would become larger than an artifact may be.
            OSError: the disk is full, or fails.
        """
        self._size += len(data)
        if self._size > self._max_bytes:
            raise ArtifactError(f"The file is larger than the limit of {self._max_bytes} bytes.")
        self._file.write(data)
        self._file.flush()  # so that whoever reads `path` sees it all

    def finish(self) -> None:
        """Make the bytes durable and accept no more; harmless when done before."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Remove the file. Harmless when it was committed or discarded before."""
        self._file.close()
        self._path.unlink(missing_ok=True)
