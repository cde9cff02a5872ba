"""Writing files so that a crash at any byte leaves the old state or the new one."""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path


def publish(temporary: Path, target: Path) -> None:
    """Move a complete, synced file to its place, replacing what is there, durably.

    Both must lie on one file system, and the target's folder must exist.
    """
    temporary.replace(target)
    sync_directory(target.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make its bytes (not yet its name) durable."""
    descriptor = create(path)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path) -> int:
    """Open a new file for writing; returns its descriptor.

    Without a buffer: one that could not be written would be written again at the close.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the bytes; raises OSError where there is room for a part of them only."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_directory(path: Path) -> None:
    """Create a folder, and the parents that it lacks, durably; harmless where it exists."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    try:
        sync_directory(path.parent)
    except OSError:
        # Where it exists, the next call takes it for durable.
        with suppress(OSError):
            path.rmdir()
        raise


def sync_directory(path: Path) -> None:
    """Make the folder's entries (creations, renames) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(folder: Path) -> Path:
    """A name in the folder that no file has."""
    return folder / f".{secrets.token_hex(16)}.tmp"


def lock_exclusively(path: Path) -> int:
    """Hold the file's lock until the returned descriptor is closed, or the process ends.

    Raises:
        BlockingIOError: someone else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
