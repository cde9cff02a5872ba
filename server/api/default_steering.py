"""The artifacts of the server's default steering: held as they are until the server stops."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

from interventions.registry import DIGEST_PREFIX, Entry, Registry, UnknownInterventionError
from server.api.errors import ApiError

SHOWN_DIGITS: Final = 12  # of a digest, in a sentence

_FileState: TypeAlias = tuple[int, ...] | None  # None: there is no file

logger = logging.getLogger(__name__)


class DefaultArtifacts:
    """Keeps the default steering's artifacts stored and named, and tells when one is damaged."""

    def __init__(self, registry: Registry, resolved: Mapping[str, Entry]) -> None:
        """Pin every artifact for as long as the registry is open.

        Args:
            resolved: what the names and digests that the operator gave refer to at start.

        Raises:
            UnknownInterventionError: one is not stored any more.
        """
        self._registry = registry
        self._given_names = {
            reference: entry.digest
            for reference, entry in resolved.items()
            if not reference.startswith(DIGEST_PREFIX)
        }
        self._entries = {entry.digest: entry for entry in resolved.values()}
        self._changes = asyncio.Lock()
        self._checking = threading.Lock()
        self._checked: dict[str, tuple[_FileState, str | None]] = {}
        for digest in self._entries:
            registry.pin(digest)

    @asynccontextmanager
    async def changing(self, name: str, digest: str | None) -> AsyncIterator[None]:
        """Lets the block change what a name points to, unless the default steering needs the name.

        Changes wait for each other: two names of one artifact may go, but not both at once.

        Args:
            digest: what the name shall point to; None where it shall be deleted.

        Raises:
            ApiError: 409, the default steering was given by this name, or its artifact has no
                other name.
        """
        async with self._changes:
            needed = self._needed(name, digest)
            if needed is not None:
                raise _in_use(name, needed, deleting=digest is None)
            yield

    @property
    def exist(self) -> bool:
        """Whether the default steering has any artifact."""
        return bool(self._entries)

    def problem(self) -> str | None:
        """Says in a sentence why an artifact cannot be loaded; None if all can.

        Reads the files whose state on the disk has changed since they were read last, so not for
        the event loop. Safe to call from several threads.
        """
        with self._checking:
            for digest, entry in self._entries.items():
                state = _state(self._registry.path(digest))
                known = self._checked.get(digest)
                if known is None or known[0] != state:
                    known = self._checked[digest] = (state, self._read(entry))
                if known[1] is not None:
                    return known[1]
        return None

    def _needed(self, name: str, digest: str | None) -> str | None:
        """The default's digest that would lose its name by a change; None if none would."""
        if name in self._given_names:
            mine = self._given_names[name]
            return None if digest == mine else mine
        for mine in self._entries:
            # A name that moves on keeps its history, by which a digest is still found.
            keeps = digest == mine or (digest is not None and not self._points_to(name, mine))
            if not keeps and self._registry.names_of(mine) == {name}:
                return mine
        return None

    def _points_to(self, name: str, digest: str) -> bool:
        try:
            return self._registry.get(name).digest == digest
        except UnknownInterventionError:
            return False

    def _read(self, entry: Entry) -> str | None:
        try:
            self._registry.load(entry.digest)
        except UnknownInterventionError as error:
            logger.error("The default steering cannot be loaded: %s", error)  # may name a path
            return f"The intervention '{entry.name}' is stored but damaged."
        return None


def default_unavailable(reason: str) -> ApiError:
    """A 503: the server's own steering fails, and the request is not served without."""
    return ApiError(
        503,
        f"The server's default steering cannot be applied: {reason}",
        code="default_steering_unavailable",
    )


def _in_use(name: str, digest: str, *, deleting: bool) -> ApiError:
    what = "be deleted" if deleting else "point to another artifact"
    return ApiError(
        409,
        f"The server's default steering uses '{name}' ({DIGEST_PREFIX}{digest[:SHOWN_DIGITS]}…): "
        f"the name cannot {what} until the server is started with another default.",
        param="name",
        code="intervention_in_use",
    )


def _state(path: Path) -> _FileState:
    """What of a file on the disk changes with every change of its bytes or its permissions."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
