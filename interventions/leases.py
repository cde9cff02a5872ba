"""Leases: what each server that has a registry open says of itself, in a file of its own.

A server whose lease lives keeps the bytes that it holds, and the names by which its default
steering was given. A lease is dead when its server has ended, which frees the file's lock, or when
it was not written for a minute by the clock of whoever looks: clocks of two machines are never
compared.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Final

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from interventions.manifest import DIGEST_PATTERN
from interventions.storage import try_lock

BEAT_SECONDS: Final = 10.0  # between two writes of a lease
DEAD_SECONDS: Final = 60.0
LEASE_SUFFIX: Final = ".json"
_ROOM: Final = 16384  # bytes of a lease from the start: a beat must need no room on the disk
_TRIES: Final = 3  # to read a lease that is just being written
_PAUSE: Final = 0.01  # seconds between two of them

logger = logging.getLogger(__name__)

Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Lease:
    """What one server needs of the registry.

    `reads` counts how often the server had read the names anew, just before it wrote what it holds.
    So two of them after an object's last name went, the server holds the object only if its lease
    says so.
    """

    server: str  # another one at every start
    host: str
    process: int
    beat: int = 0  # grows as long as the server lives
    reads: int = 0
    held: frozenset[Digest] = frozenset()  # by running requests, and by the default steering
    default: Mapping[str, Digest] = field(
        default_factory=dict
    )  # the default steering's references, and what they meant

    @property
    def where(self) -> str:
        """Where the server runs, for people."""
        return f"{self.host}, process {self.process}"


_ADAPTER: Final[TypeAdapter[Lease]] = TypeAdapter(Lease)


class Leases:
    """A server's own lease, and those of the others. `beat` alone is for any thread.

    Everything else is for whoever holds the registry's lock, which `beat` never waits for: so a
    lease lives on while another server is slow to write. The methods raise OSError.
    """

    def __init__(self, folder: Path, server: str, clock: Callable[[], float]) -> None:
        """Name the folder of leases; nothing is read or written.

        Args:
            server: which server this is.
            clock: seconds that only grow.
        """
        self._folder = folder
        self._clock = clock
        self.own = Lease(server, socket.gethostname()[:100], os.getpid())
        self._descriptor: int | None = None
        # Of each other server: the bytes of its lease, and when they were first seen.
        self._seen: dict[str, tuple[bytes, float]] = {}

    @property
    def path(self) -> Path:
        """The file of this server's lease."""
        return self._folder / f"{self.own.server}{LEASE_SUFFIX}"

    @property
    def lost(self) -> bool:
        """Whether the file of this server's lease is not where it was made."""
        try:
            return self._descriptor is None or not os.path.samestat(
                os.fstat(self._descriptor), self.path.stat()
            )
        except FileNotFoundError:
            return True

    def open(self) -> None:
        """Make this server's file, or make it again where it was lost."""
        self._close()
        self.path.unlink(missing_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._descriptor = descriptor
        if not try_lock(descriptor):
            raise OSError("the file of a new lease is locked")
        self._write_if_possible()

    def close(self) -> None:
        """Remove this server's file."""
        if self._descriptor is not None and not self.lost:
            self.path.unlink(missing_ok=True)
        self._close()

    def keep(self, default: Mapping[str, str]) -> None:
        """Hold what the default steering's references mean, for as long as the server runs."""
        held = self.own.held | set(default.values())
        self.own = replace(self.own, default=dict(default), held=held)
        self._write_if_possible()

    def beat(self, held: Set[str], *, read: bool) -> None:
        """Write that this server lives, and what it holds.

        Args:
            read: whether the names were read just before `held` was told, and under the
                registry's lock.
        """
        self.own = replace(
            self.own,
            beat=self.own.beat + 1,
            reads=self.own.reads + read,
            held=frozenset(held) | set(self.own.default.values()),
        )
        self._write()

    def others(self) -> dict[str, Lease | None]:
        """The leases of the other servers that live; None for one that cannot be read.

        Dead ones are removed.
        """
        living: dict[str, Lease | None] = {}
        for path in sorted(self._folder.glob(f"*{LEASE_SUFFIX}")):
            server = path.name.removesuffix(LEASE_SUFFIX)
            if server == self.own.server:
                continue
            try:
                data, lease = _read(path)
                if self._dead(path, server, data):
                    logger.warning("a server's lease is dead, removed: %s", path)
                    path.unlink(missing_ok=True)
                else:
                    living[server] = lease
            except FileNotFoundError:
                pass
        self._seen = {server: self._seen[server] for server in living}
        return living

    def _dead(self, path: Path, server: str, data: bytes) -> bool:
        now = self._clock()
        before, since = self._seen.get(server, (b"", now))
        self._seen[server] = (data, since if data == before else now)
        if data == before and now - since >= DEAD_SECONDS:
            return True
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return try_lock(descriptor)  # its server holds it, as long as there is one
        finally:
            os.close(descriptor)

    def _write_if_possible(self) -> None:
        try:
            self._write()
        except OSError as error:
            logger.warning("the lease cannot be written, tried again later: %s", error)

    def _write(self) -> None:
        """Write in place, which needs no room, or leave a lease that nobody can read.

        The others take a server whose lease they cannot read to hold everything.
        """
        if self._descriptor is None:
            raise FileNotFoundError("the lease is not open")
        data = _ADAPTER.dump_json(self.own).ljust(_ROOM)
        try:
            rest, place = memoryview(data), 0
            while rest:
                written = os.pwrite(self._descriptor, rest, place)
                rest, place = rest[written:], place + written
            os.ftruncate(self._descriptor, len(data))
        except OSError:
            os.ftruncate(self._descriptor, 0)
            raise

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _read(path: Path) -> tuple[bytes, Lease | None]:
    """A lease's bytes, and what they say if they are not just being written."""
    data = b""
    for _ in range(_TRIES):
        data = path.read_bytes()
        try:
            lease = _ADAPTER.validate_json(data)
            if lease.server == path.name.removesuffix(LEASE_SUFFIX):
                return data, lease
        except ValidationError:
            pass
        time.sleep(_PAUSE)
    return data, None
