"""What a registry keeps in memory of names and damaged files, which HTTP does not tell."""

from interventions.catalogue import Damage
from interventions.name_records import Version
from interventions.registry import Registry


def history_of(registry: Registry, name: str) -> tuple[Version, ...]:
    """Return all events of a name, oldest first, also of a deleted one; KeyError if unknown."""
    return registry._catalogue.records[name].versions


def names_of(registry: Registry, digest: str) -> frozenset[str]:
    """Return the names that `Catalogue.names_of` finds."""
    return registry._catalogue.names_of(digest)


def damaged_files(registry: Registry) -> tuple[Damage, ...]:
    """Return the files that the registry could not understand, or missed."""
    return registry._catalogue.damaged()
