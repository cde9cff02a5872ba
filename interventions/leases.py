"""Leases: what each server that has a registry open says of itself, in a file of its own.

A server whose lease lives keeps the bytes that it holds, and the names by which its default
steering was given. A lease is dead when its server has ended, which frees the file's lock, or when
it was not touched for a minute by the clock of whoever looks: clocks of two machines are never
compared.
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

BEAT_SECONDS: Final = 10.0  # between two beats of a lease
DEAD_SECONDS: Final = 60.0
# At most so much of the time between two looks counts as a lease's silence. While nobody could
# look, because the folder was away or the machine suspended, nobody could beat either.
_COUNTED_SECONDS: Final = 2 * BEAT_SECONDS
LEASE_SUFFIX: Final = ".json"
_ROOM: Final = 16384  # bytes of a lease from the start: a beat must need no room on the disk

logger = logging.getLogger(__name__)

_State: TypeAlias = tuple[bytes, int]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Lease:
    """States what one server needs of the registry.

    `reads` counts how often the server had read the names anew, just before it wrote what it holds.
    So two of them after an object's last name went, the server holds the object only if its lease
    says so. Only with them does `held` change, or an object would seem free that is held again
    before the names are read.
    """

    server: str  # another one at every start
    host: str
    process: int
    reads: int = 0
    held: frozenset[Digest] = frozenset()  # by running requests, and by the default steering
    # The references by which the default steering was given -> the digests that they meant.
    default: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Say where the server runs, for people."""
        return f"{self.host}, process {self.process}"


_ADAPTER: Final[TypeAdapter[Lease]] = TypeAdapter(Lease)


class Leases:
    """A server's own lease, and those of the others. `touch` alone is for any thread.

    Everything else is for whoever holds the registry's lock, which `touch` never waits for: so a
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
        self._written = False  # ever, to the file that is open
        # For each other server: its lease when it was last seen, and for how many seconds it has
        # been the same.
        self._seen: dict[str, tuple[_State, float]] = {}
        self._looked: float | None = None  # when, by the clock

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
        self._descriptor, self._written = descriptor, False
        if not try_lock(descriptor):
            raise OSError("the file of a new lease is locked")
        self._write_if_possible()

    def close(self) -> None:
        """Remove this server's file."""
        try:
            if not self.lost:
                self.path.unlink(missing_ok=True)
        finally:
            self._close()

    def keep(self, default: Mapping[str, str]) -> None:
        """Hold what the default steering's references mean, for as long as the server runs.

        Where that cannot be written, nothing is held; but a server that starts on a full disk,
        which had no room for the lease, holds it all the same. The others learn of it from the
        first beat that finds room. Until then they keep the bytes, as this server has written no
        reading of the names.
        """
        self._find()
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

    def beat(self, held: Set[str]) -> None:
        """Write that this server lives, and what it holds now that it has just read the names."""
        self._find()
        self.own = replace(
            self.own,
            reads=self.own.reads + 1,
            held=frozenset(held) | set(self.own.default.values()),
        )
        self._write()

    def touch(self) -> None:
        """Note that this server lives, and nothing else: the others look at the file's time too."""
        if self._descriptor is None:
            raise FileNotFoundError("the lease is not open")
        os.utime(self._descriptor)

    def others(self) -> dict[str, Lease | None]:
        """The leases of the other servers that live; None for one that cannot be read.

        Dead ones are removed.
        """
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

    def _find(self) -> None:
        """Make this server's file again, if it was lost."""
        if self.lost:
            logger.warning(
                "this server's lease was gone, made again: either the server or its disk had "
                "stopped for a minute, or a file's lock does not keep other machines out"
            )
            self.open()

    def _write_if_possible(self) -> None:
        try:
            self._write()
        except OSError as error:
            logger.warning("the lease cannot be written, tried again later: %s", error)

    def _write(self) -> None:
        """Write in place, which needs no room, or leave a lease that nobody can read.

        The others take a server whose lease they cannot read to hold everything. Only the first
        writing may find no room: then the file stays empty, which says that nothing is held.
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
            os.fsync(self._descriptor)  # so that other machines read it, before the lock is free
            self._written = True
        except OSError:
            os.ftruncate(self._descriptor, 1 if self._written else 0)
            raise

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _state(path: Path) -> tuple[_State, bool]:
    """A lease's bytes and the time of its last change; and whether its server has ended."""
    with path.open("r+b") as file:
        ended = try_lock(file.fileno())  # its server holds it, as long as there is one
        return (file.read(), os.fstat(file.fileno()).st_mtime_ns), ended


def _parse(data: bytes, server: str) -> Lease | None:
    if not data:  # for want of room: so its server never read the names, and has no default
        return Lease(server, host="unknown", process=0)
    try:
        lease = _ADAPTER.validate_json(data)
    except ValidationError:
        return None
    return lease if lease.server == server else None
