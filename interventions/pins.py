"""Keeps the current catalogue and the pins, for all threads: nothing here waits for a disk."""

import threading
from collections import Counter
from collections.abc import Mapping

from interventions.artifact import Summary
from interventions.catalogue import DIGEST_PREFIX, Catalogue
from interventions.errors import RegistryError


class PinnedCatalogue:
    """The current catalogue, and how often each digest is pinned.

    `pin` and `unpin` are for any thread, an event loop's too. What replaces the catalogue is for
    whoever holds the registry's lock for writers.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._lock = threading.Lock()  # held for a few operations in memory
        self._catalogue = catalogue
        self._pins: Counter[str] = Counter()

    @property
    def catalogue(self) -> Catalogue:
        """Return the current catalogue."""
        return self._catalogue

    def replace(self, catalogue: Catalogue) -> None:
        """Let everybody see another catalogue from now on."""
        with self._lock:
            self._catalogue = catalogue

    def pin(self, digest: str) -> None:
        """Count one more use.

        Raises:
            UnknownInterventionError: the object is not stored, or its bytes are being removed.
        """
        with self._lock:
            self._catalogue.summary(digest)
            self._pins[digest] += 1

    def unpin(self, digest: str) -> bool:
        """Undo one `pin`; returns whether nothing needs the object any more.

        Raises:
            RegistryError: the digest is not pinned.
        """
        with self._lock:
            if not self._pins[digest]:
                raise RegistryError(f"{DIGEST_PREFIX}{digest} is not pinned.")
            self._pins[digest] -= 1
            if self._pins[digest]:
                return False
            del self._pins[digest]
            return not self._catalogue.needs(digest) and digest in self._catalogue.objects

    def take_unneeded(self, failed: str | None = None) -> Mapping[str, Summary]:
        """Take out the objects that neither a live name nor a pin needs; none can be pinned then.

        Args:
            failed: the digest of an object that came with a change that has failed: what came
                before, damaged or not, cannot need it.

        Returns:
            Them, by digest.
        """
        catalogue = self._catalogue  # nobody else replaces it meanwhile
        candidates = [
            digest
            for digest in catalogue.objects
            if not catalogue.needs(digest) or (digest == failed and not catalogue.refers_to(digest))
        ]
        if not candidates:
            return {}
        kept = dict(catalogue.objects)
        with self._lock:
            taken = {each: kept.pop(each) for each in candidates if not self._pins[each]}
            if taken:
                self._catalogue = catalogue.with_objects(kept)
        return taken

    def put_back(self, digest: str, summary: Summary) -> None:
        """Undo taking one object out: its bytes are still there."""
        with self._lock:
            self._catalogue = self._catalogue.with_object(digest, summary)
