"""Reads a registry's names, history and damaged files, some of which HTTP does not show."""

from interventions.catalogue import Damage
from interventions.name_records import Version
from interventions.registry import Registry


def history_of(registry: Registry, name: str) -> tuple[Version, ...]:
    """Return all events of a name, oldest first, also of a deleted one; KeyError if unknown."""
    return registry._catalogue.records[name].versions


def names_of(registry: Registry, digest: str) -> frozenset[str]:
    """Return the names that point to a digest."""
    return registry._catalogue.names_of(digest)


def damaged_files(registry: Registry) -> tuple[Damage, ...]:
    """Return the files that the registry could not read, or that were missing."""
    return registry._catalogue.damaged()
