"""Lets a test watch, refuse or delay each operation that changes a registry's disk."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

# The functions of `os` that change a disk; pathlib calls these too.
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
    """Calls `before` with the name and the path of each operation that changes a folder.

    An `open` that may create a file is named `create`; other opens are not reported. `before` may
    wait. It may also raise, and the operation is then not done, except for `close`: that closes
    the descriptor first, as the system does even when it reports an error.
    """

    def __init__(self, root: Path, before: Callable[[str, Path], None]) -> None:
        self._root = root
        self._before = before
        self._opened: dict[int, Path] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the functions of `os` until the patches are undone."""
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
    """Fails one operation, or that and all later ones, and records every operation."""

    def __init__(self, number: int, fails: int, *, lasting: bool) -> None:
        """Make a disk that fails at one operation.

        Args:
            number: the operation's number, counted from 0.
            fails: the error's errno. Where it means a full disk, operations that need no space
                succeed.
            lasting: whether all later operations fail too.
        """
        self._number = number
        self._fails = fails
        self._lasting = lasting
        self.done: list[str] = []  # every operation that was asked for, refused ones too
        self.refused: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        """Record an operation, and raise OSError if it is one that fails."""
        number = len(self.done)
        self.done.append(f"{operation} {path.name}")
        if self._fails in (errno.ENOSPC, errno.EDQUOT) and operation not in NEEDS_ROOM:
            return
        if number == self._number or (self._lasting and number > self._number):
            self.refused.append(operation)
            raise OSError(self._fails, os.strerror(self._fails), str(path))


@contextmanager
def watching(root: Path, before: Callable[[str, Path], None]) -> Iterator[None]:
    """Watch a folder's disk within the context."""
    with pytest.MonkeyPatch.context() as patched:
        WatchedDisk(root, before).install(patched)
        yield


class SlowDisk:
    """Makes one kind of operation wait until `go_on` is set."""

    def __init__(self, held: str) -> None:
        """Take the calling thread for the event loop's, whose operations go to `on_the_loop`."""
        self._held = held
        self._loop = threading.current_thread()
        self.go_on = threading.Event()
        self.waiting: list[str] = []
        self.on_the_loop: list[str] = []  # the operations that the loop's thread asked for

    def before(self, operation: str, path: Path) -> None:
        """Wait if the operation is of the kind that is held and another thread asks for it."""
        if threading.current_thread() is self._loop:
            self.on_the_loop.append(f"{operation} {path}")
        elif operation == self._held:
            self.waiting.append(path.name)
            assert self.go_on.wait(60)
