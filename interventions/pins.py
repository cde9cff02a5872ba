"""Keeps the current catalogue and the pins for all threads, without waiting for a disk."""

import threading
from collections import Counter

from interventions.catalogue import DIGEST_PREFIX, Catalogue
from interventions.errors import RegistryError


class PinnedCatalogue:
    """The current catalogue, and how often each digest is pinned. Any thread may use it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._lock = threading.Lock()  # held for a few operations in memory
        self.catalogue = catalogue
        self._pins: Counter[str] = Counter()

    def pin(self, digest: str) -> None:
        """Keep an object until `unpin` has been called for it as often as `pin`.

        Raises:
            UnknownInterventionError: the object is not stored, or its bytes are being removed.
        """
        with self._lock:
            self.catalogue.summary(digest)
            self._pins[digest] += 1

    def unpin(self, digest: str) -> bool:
        """Undo one `pin`.

        Returns True if the object may be removed: the catalogue holds it, and neither a pin nor a
        name needs it.

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
            return not self.catalogue.needs(digest) and digest in self.catalogue.objects

    def replace(self, found: Catalogue) -> frozenset[str]:
        """Make `found`, read from the registry's folder, the current catalogue.

        Returns the pinned digests, which the server's lease must name.

        An object that no name needs is left out, so that it cannot be pinned any more, unless it is
        pinned now. A pinned object stays even if its file is missing.
        """
        needed = {digest: each for digest, each in found.objects.items() if found.needs(digest)}
        with self._lock:
            pinned = frozenset(+self._pins)
            kept = {
                digest: each for digest, each in self.catalogue.objects.items() if digest in pinned
            }
            self.catalogue = found.with_objects({**kept, **needed})
        return pinned
