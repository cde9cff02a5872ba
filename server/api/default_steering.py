"""Keeps the artifacts of the server's default steering unchanged until the server stops."""

import logging
import threading
from collections.abc import Mapping

from interventions.catalogue import Entry
from interventions.errors import RegistryError
from interventions.registry import Registry
from interventions.storage import FileState, file_state
from server.api.errors import ApiError

logger = logging.getLogger(__name__)


class DefaultArtifacts:
    """Keeps the default steering's artifacts stored and named, and tells when one is damaged."""

    def __init__(self, registry: Registry, resolved: Mapping[str, Entry]) -> None:
        """Pin every artifact and protect its names until this server closes the registry.

        The protection holds for all servers that share the registry.

        Args:
            resolved: the entry of each name and digest that the operator gave, at the start.

        Raises:
            RegistryError: an artifact is not stored any more, or the registry cannot record this.
        """
        self._registry = registry
        self._entries = {entry.digest: entry for entry in resolved.values()}
        self._checking = threading.Lock()
        self._checked: dict[str, tuple[FileState, str | None]] = {}
        if resolved:
            registry.keep_default({given: entry.digest for given, entry in resolved.items()})

    @property
    def exist(self) -> bool:
        """True if the default steering has any artifact."""
        return bool(self._entries)

    def problem(self) -> str | None:
        """Say in a sentence why an artifact cannot be loaded; None if all can.

        Reads every file that has changed since it was last read, so it must not be called on the
        event loop. Safe to call from several threads.
        """
        with self._checking:
            for digest, entry in self._entries.items():
                state = file_state(self._registry.path(digest))
                known = self._checked.get(digest)
                if known is None or known[0] != state:
                    known = self._checked[digest] = (state, self._read(entry))
                if known[1] is not None:
                    return known[1]
        return None

    def _read(self, entry: Entry) -> str | None:
        try:
            self._registry.load(entry.digest)
        except RegistryError as error:
            # The client is not told the reason, which may name a path.
            logger.error("The default steering cannot be loaded: %s", error)
            return f"The intervention '{entry.name}' is stored but damaged."
        return None


def default_unavailable(reason: str) -> ApiError:
    """Return the 503 for a request that is not served because the default steering fails."""
    return ApiError(
        503,
        f"The server's default steering cannot be applied: {reason}",
        code="default_steering_unavailable",
    )
