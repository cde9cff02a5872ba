"""Holds an upload in a temporary file of the registry, until it is stored."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from interventions.errors import disk_errors
from interventions.header import ArtifactError
from interventions.storage import create, write_all


class StagedUpload:
    """A temporary file inside the registry, removed by `discard` unless it was committed.

    Every method waits for the disk, and for a call that another thread has begun.
    """

    def __init__(self, path: Path, max_bytes: int, remove: Callable[[Path], None]) -> None:
        """Create the file.

        Args:
            max_bytes: the largest size of the file.
            remove: removes the file, if it exists, without raising.

        Raises:
            RegistryDiskError: the disk is full, or fails.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._remove = remove
        self._size = 0
        self._using = threading.Lock()
        with disk_errors():
            self._descriptor: int | None = create(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            ArtifactError: the file would become larger than an artifact may be.
            RegistryDiskError: the disk is full, or fails.
        """
        with self._using, disk_errors():
            self._size += len(data)
            if self._size > self._max_bytes:
                raise ArtifactError(
                    f"The file is larger than the limit of {self._max_bytes} bytes."
                )
            if self._descriptor is None:
                raise ValueError("The upload is finished.")
            write_all(self._descriptor, data)

    def finish(self) -> None:
        """Make the bytes durable and accept no more. May be called again.

        Raises:
            RegistryDiskError: the disk is full, or fails.
        """
        with self._using, disk_errors():
            if self._descriptor is not None:
                os.fsync(self._descriptor)
                self._close()

    def discard(self) -> None:
        """Remove the file, unless it was committed. May be called again."""
        with self._using:
            try:
                self._close()
            except OSError:
                pass  # the bytes are not needed any more
            finally:
                self._remove(self.path)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
