"""A registry's disk under a test's control: every change of it is counted, refused or held up."""

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest

# What changes a disk, by its name in `os`; pathlib calls these too.
OPERATIONS: Final = (
    "open",
    "write",
    "fsync",
    "close",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
    "utime",
)
ON_DESCRIPTORS: Final = ("write", "fsync")
NEEDS_ROOM: Final = frozenset({"create", "write", "fsync", "mkdir"})
FOLDER_SYNC: Final = "fsync of a folder"


class WatchedDisk:
    """Tells `before` of every operation in a folder that changes it, by its name and its path.

    `open` comes as `create` where it may make a file, and not at all where it does not. `before`
    may raise, and the operation is not done then (but `close` is: a descriptor is gone whatever
    happens), or wait.
    """

    def __init__(self, root: Path, before: Callable[[str, Path], None]) -> None:
        self._root = root
        self._before = before
        self._opened: dict[int, Path] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch until the patches are undone."""
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, operation: Callable[..., object]) -> Callable[..., object]:
        if name == "open":
            return partial(self._open, operation)
        if name == "close":
            return partial(self._close, operation)
        return partial(
            self._on_descriptor if name in ON_DESCRIPTORS else self._on_path, name, operation
        )

    def _open(
        self,
        operation: Callable[..., object],
        path: object,
        flags: int,
        *rest: object,
        **named: object,
    ) -> object:
        inside = self._inside(path)
        if inside is not None and flags & os.O_CREAT:
            self._before("create", inside)
        descriptor = operation(path, flags, *rest, **named)
        if inside is not None and isinstance(descriptor, int):
            self._opened[descriptor] = inside
        return descriptor

    def _close(self, operation: Callable[..., object], descriptor: int) -> None:
        path = self._opened.pop(descriptor, None)
        operation(descriptor)
        if path is not None and not path.is_dir():
            self._before("close", path)

    def _on_descriptor(
        self, name: str, operation: Callable[..., object], descriptor: int, *rest: object
    ) -> object:
        if (path := self._opened.get(descriptor)) is not None:
            self._before(FOLDER_SYNC if path.is_dir() else name, path)
        return operation(descriptor, *rest)

    def _on_path(
        self,
        name: str,
        operation: Callable[..., object],
        path: object,
        *rest: object,
        **named: object,
    ) -> object:
        if (inside := self._inside(path)) is not None:
            self._before(name, inside)
        return operation(path, *rest, **named)

    def _inside(self, path: object) -> Path | None:
        if not isinstance(path, str | Path):
            return None
        return Path(path) if Path(path).is_relative_to(self._root) else None


class FaultyDisk:
    """Refuses one operation, or all from there on; counts those that it lets through."""

    def __init__(self, number: int, fails: int, *, lasting: bool) -> None:
        """From the operation with this number on (from 0), with this number as the error's.

        Args:
            lasting: all that come after fail too; those that need no room succeed on a full disk.
        """
        self._number = number
        self._fails = fails
        self._lasting = lasting
        self.done: list[str] = []  # what was done or refused
        self.refused: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        """Refuse an operation, or not."""
        number = len(self.done)
        self.done.append(f"{operation} {path.name}")
        if self._fails in (errno.ENOSPC, errno.EDQUOT) and operation not in NEEDS_ROOM:
            return
        if number == self._number or (self._lasting and number > self._number):
            self.refused.append(operation)
            raise OSError(self._fails, os.strerror(self._fails), str(path))


class SlowDisk:
    """Holds up one kind of operation until it is told to go on."""

    def __init__(self, held: str) -> None:
        """Make it on the thread of the event loop, which must ask for no operation of any kind."""
        self._held = held
        self._loop = threading.current_thread()
        self.go_on = threading.Event()
        self.waiting: list[str] = []
        self.on_the_loop: list[str] = []  # the operations that the loop's thread asked for

    def before(self, operation: str, path: Path) -> None:
        """Wait, if it is that operation."""
        if threading.current_thread() is self._loop:
            self.on_the_loop.append(f"{operation} {path}")
        elif operation == self._held:
            self.waiting.append(path.name)
            assert self.go_on.wait(60)
