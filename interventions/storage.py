"""Writes files so that a crash at any byte leaves the old state or the new one."""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

FileState: TypeAlias = tuple[int, ...]
"""Numbers that change whenever a file's bytes change; empty if there is no file."""
UNREADABLE: Final[FileState] = (-1,)  # equals no file's state, so the file is read again


def publish(temporary: Path, target: Path) -> None:
    """Move a complete, synced file to `target`, replacing an older one, durably.

    Both paths must be on one file system, and the target's folder must exist.
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
    """Open a new file for writing; return its descriptor.

    There is no buffer, because closing the file would write the buffer again after an error.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the bytes; raise OSError if there is room for only a part of them."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_directory(path: Path) -> None:
    """Create a folder and its missing parents durably, unless it exists."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    try:
        sync_directory(path.parent)
    except OSError:
        # Otherwise the next call would take it for durable.
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


def temporary_path(folder: Path, owner: str = "") -> Path:
    """Return a new random path in the folder; the file's name begins with `owner`."""
    return folder / f"{owner}.{secrets.token_hex(16)}.tmp"


def try_lock(descriptor: int) -> bool:
    """Lock an open file until its descriptor is closed; return False if it is locked already.

    Locks of one process exclude each other too.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_state(file: "Path | os.DirEntry[str]") -> FileState:
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    except OSError:
        return UNREADABLE
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
