"""Keeps the current catalogue and the pins, for all threads: nothing here waits for a disk."""

import threading
from collections import Counter

from interventions.catalogue import DIGEST_PREFIX, Catalogue
from interventions.errors import RegistryError


class PinnedCatalogue:
    """The current catalogue, and how often each digest is pinned.

    `pin` and `unpin` are for any thread, an event loop's too.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._lock = threading.Lock()  # held for a few operations in memory
        self._catalogue = catalogue
        self._pins: Counter[str] = Counter()

    @property
    def catalogue(self) -> Catalogue:
        """Return the current catalogue."""
        return self._catalogue

    @property
    def pinned(self) -> frozenset[str]:
        """Return every digest that is pinned."""
        with self._lock:
            return frozenset(+self._pins)

    def pin(self, digest: str) -> None:
        """Count one more use.

        Raises:
            UnknownInterventionError: the object is not stored, or its bytes are being removed.
        """
        with self._lock:
            self._catalogue.summary(digest)
            self._pins[digest] += 1

    def unpin(self, digest: str) -> bool:
        """Undo one `pin`; returns whether nothing here needs the object any more.

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

    def show(self, found: Catalogue) -> frozenset[str]:
        """Let everybody see what was found in the folder, from now on.

        An object that no live name needs is left out, unless it is pinned: so from now on nobody
        can pin it. One that is pinned stays, wherever its file is.

        Returns:
            The digests that are pinned.
        """
        needed = {digest: each for digest, each in found.objects.items() if found.needs(digest)}
        with self._lock:
            pinned = frozenset(+self._pins)
            kept = {
                digest: each for digest, each in self._catalogue.objects.items() if digest in pinned
            }
            self._catalogue = found.with_objects({**kept, **needed})
        return pinned
