"""Writing files so that a crash at any byte leaves the old state or the new one."""

import fcntl
import os
import secrets
from pathlib import Path


def publish(temporary: Path, target: Path) -> None:
    """Move a complete, synced file to its place, replacing what is there, durably.

    Both must lie on one file system, and the target's folder must exist.
    """
    temporary.replace(target)
    sync_directory(target.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make its bytes (not yet its name) durable."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_durably(target: Path, data: bytes, temporary_folder: Path) -> None:
    """Write a file through a temporary one: at any moment the target is the old file or the new.

    The temporary file is removed if writing fails.
    """
    temporary = temporary_path(temporary_folder)
    try:
        write_synced(temporary, data)
        publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Create a folder, and the parents that it lacks, durably; harmless where it exists."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


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
