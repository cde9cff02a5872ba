"""Keeps leases: files in which each server of a registry states what it needs.

As long as a server's lease is alive, no server deletes the bytes that it lists, or the names of the
server's default steering. A lease is dead if its file is no longer locked, because the server has
ended, or if the file has not changed for a minute by the clock of the server that reads it; the
clocks of two machines are never compared.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping, Set
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Final, TypeAlias

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from interventions.errors import is_full
from interventions.manifest import DIGEST_PATTERN
from interventions.storage import try_lock

HEARTBEAT_SECONDS: Final = 10.0  # between two heartbeats of a lease
DEAD_SECONDS: Final = 60.0
# Longest part of the time between two polls that counts as a lease's silence. A longer pause means
# that the folder was away or the machine suspended, and then no server could renew its lease.
_COUNTED_SECONDS: Final = 2 * HEARTBEAT_SECONDS
LEASE_SUFFIX: Final = ".json"
_ROOM: Final = 16384  # bytes of every lease, so that a heartbeat needs no more room on the disk

logger = logging.getLogger(__name__)

_State: TypeAlias = tuple[bytes, int]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Lease:
    """States what one server needs of the registry.

    `reads` counts how often the server has read the names and then written `held`; `held` never
    changes without it. After two reads since an object lost its last name, the server holds the
    object only if `held` lists it.
    """

    server: str  # drawn at random at every start
    host: str
    process: int
    reads: int = 0
    held: frozenset[Digest] = frozenset()  # used by running requests or by the default steering
    # The default steering: names and sha256:<digest>s as given -> their digests at the start.
    default: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """The server's host and process, for people."""
        return f"{self.host}, process {self.process}"


_ADAPTER: Final[TypeAdapter[Lease]] = TypeAdapter(Lease)


class Leases:
    """Writes a server's own lease, and reads the leases of the other servers.

    Only `touch` may be called without the registry's lock, so that the lease stays alive while
    another server holds the lock. The methods raise OSError.
    """

    def __init__(self, folder: Path, server: str, clock: Callable[[], float]) -> None:
        """Make the lease; nothing is read or written.

        Args:
            server: this server's name in the registry.
            clock: returns monotonic seconds.
        """
        self._folder = folder
        self._clock = clock
        self.own = Lease(server, socket.gethostname()[:100], os.getpid())
        self._descriptor: int | None = None
        self._written = False  # True once the open file has been written
        # For each other server: the last state of its lease, and for how many seconds it has been
        # the same.
        self._seen: dict[str, tuple[_State, float]] = {}
        self._looked: float | None = None  # time of the last call of `others`

    @property
    def path(self) -> Path:
        """The path of this server's lease."""
        return self._folder / f"{self.own.server}{LEASE_SUFFIX}"

    @property
    def file_lost(self) -> bool:
        """True if another file, or none, is at this server's path now."""
        try:
            return self._descriptor is None or not os.path.samestat(
                os.fstat(self._descriptor), self.path.stat()
            )
        except FileNotFoundError:
            return True

    def open(self) -> None:
        """Create this server's file, also if it was created before and lost."""
        self._close()
        self.path.unlink(missing_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._descriptor, self._written = descriptor, False
        if not try_lock(descriptor):
            raise OSError("the file of a new lease is locked")
        try:
            self._write()
        except OSError as error:
            logger.warning("the lease cannot be written, tried again later: %s", error)

    def close(self) -> None:
        """Remove this server's file."""
        try:
            if not self.file_lost:
                self.path.unlink(missing_ok=True)
        finally:
            self._close()

    def keep(self, default: Mapping[str, str]) -> None:
        """Hold the default steering's artifacts for as long as the server runs.

        If the lease cannot be written, nothing is held, with one exception: a server that starts on
        a full disk, without room for its lease, holds them in memory. The other servers learn of it
        from the first heartbeat that finds room. Until then they keep the bytes, because this
        server's `reads` is still 0.
        """
        self._restore_file()
        before = self.own
        held = self.own.held | set(default.values())
        self.own = replace(self.own, default=dict(default), held=held)
        try:
            self._write()
        except OSError as error:
            if self._written or not is_full(error):
                self.own = before
                raise
            logger.warning("the other servers do not know of the default steering yet: %s", error)

    def heartbeat(self, held: Set[str]) -> None:
        """Write the digests that this server holds, just after it has read the names."""
        self._restore_file()
        self.own = replace(
            self.own,
            reads=self.own.reads + 1,
            held=frozenset(held) | set(self.own.default.values()),
        )
        self._write()

    def touch(self) -> None:
        """Renew the file's modification time, which shows other servers that this one is alive."""
        if self._descriptor is None:
            raise FileNotFoundError("the lease is not open")
        os.utime(self._descriptor)

    def others(self) -> dict[str, Lease | None]:
        """Remove dead leases; return the other servers' live ones, None for an unreadable lease."""
        now = self._clock()
        passed = 0.0 if self._looked is None else min(now - self._looked, _COUNTED_SECONDS)
        self._looked = now
        living: dict[str, Lease | None] = {}
        seen: dict[str, tuple[_State, float]] = {}
        for path in sorted(self._folder.glob(f"*{LEASE_SUFFIX}")):
            server = path.name.removesuffix(LEASE_SUFFIX)
            if server == self.own.server:
                continue
            try:
                state, ended = _state(path)
                before, seconds = self._seen.get(server, (None, 0.0))
                seconds = seconds + passed if state == before else 0.0
                if ended or seconds >= DEAD_SECONDS:
                    logger.warning("a server's lease is dead, removed: %s", path)
                    path.unlink(missing_ok=True)
                else:
                    seen[server], living[server] = (state, seconds), _parse(state[0], server)
            except FileNotFoundError:
                pass  # its server has just closed
        self._seen = seen
        return living

    def _restore_file(self) -> None:
        if self.file_lost:
            logger.warning(
                "this server's lease was gone, made again: either the server or its disk had "
                "stopped for a minute, or a file's lock does not keep other machines out"
            )
            self.open()

    def _write(self) -> None:
        """Write the lease in place, which needs no room, or leave an unreadable lease.

        The other servers assume that a server with an unreadable lease holds everything. Only the
        first write may find no room: then the file stays empty, which means that nothing is held.
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
            os.fsync(self._descriptor)  # other machines must read it once the lock is free
            self._written = True
        except OSError:
            os.ftruncate(self._descriptor, 1 if self._written else 0)
            raise

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _state(path: Path) -> tuple[_State, bool]:
    """Return a lease's bytes and modification time, and whether its server has ended."""
    with path.open("r+b") as file:
        ended = try_lock(file.fileno())  # the server locks its lease until it ends
        return (file.read(), os.fstat(file.fileno()).st_mtime_ns), ended


def _parse(data: bytes, server: str) -> Lease | None:
    if not data:  # a full disk had no room for it; the server has not read the names yet
        return Lease(server, host="unknown", process=0)
    try:
        lease = _ADAPTER.validate_json(data)
    except ValidationError:
        return None
    return lease if lease.server == server else None
