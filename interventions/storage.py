"""Writing files so that a crash at any byte leaves the old state or the new one."""

import fcntl
import os
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_LONGEST_PAUSE: Final = 0.02  # seconds between two tries to lock a file


class LockedError(Exception):
    """Someone else holds a lock for longer than one wants to wait."""


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


def temporary_path(folder: Path, owner: str = "") -> Path:
    """A name in the folder that no file has; it begins with the owner's name."""
    return folder / f"{owner}.{secrets.token_hex(16)}.tmp"


def try_lock(descriptor: int) -> bool:
    """Lock an open file until its descriptor is closed or the process ends, unless another has it.

    Returns:
        Whether it is locked now. Locks of one process exclude each other too.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Holds a file's lock for the block. The file must exist, and must stay where it is.

    Raises:
        LockedError: someone else has held it for so many seconds.
        OSError: the file cannot be opened or locked.
    """
    deadline = time.monotonic() + seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # A folder that went and came back has another file of this name.
            if try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield
                return
        finally:
            with suppress(OSError):  # nothing was written to it
                os.close(descriptor)
        if time.monotonic() > deadline:
            raise LockedError
        time.sleep(random.uniform(0, _LONGEST_PAUSE))
