"""Refuses changes of names that the default steering of any server of a registry needs."""

from collections.abc import Mapping

from interventions.catalogue import DIGEST_PREFIX, Catalogue
from interventions.errors import NameInUseError, RegistryBusyError
from interventions.leases import Leases


def check_default(leases: Leases, catalogue: Catalogue, name: str, digest: str | None) -> None:
    """Refuse a change of a name that a server's default steering needs.

    Args:
        leases: the leases of all servers; the registry is locked.
        catalogue: the registry's content before the change.
        name: the name to change.
        digest: the digest that it shall point to; None to delete it.

    Raises:
        NameInUseError: a default names it, or names an artifact that has no other name.
        RegistryBusyError: a server's lease cannot be read.
    """
    if (needed := _digest_losing_its_name(leases.own.default, catalogue, name, digest)) is not None:
        raise NameInUseError(name, needed, None, deleting=digest is None)
    for lease in leases.others().values():
        if lease is None:
            raise RegistryBusyError(
                "The lease of another server of this registry cannot be read now, so what its "
                "default steering needs is not known; nothing was changed."
            )
        if (needed := _digest_losing_its_name(lease.default, catalogue, name, digest)) is not None:
            raise NameInUseError(name, needed, lease.location, deleting=digest is None)


def _digest_losing_its_name(
    default: Mapping[str, str], catalogue: Catalogue, name: str, digest: str | None
) -> str | None:
    """Return the digest of a default that would lose its name by the change, or None."""
    if name in default:
        return None if digest == default[name] else default[name]
    for reference, mine in default.items():
        if not reference.startswith(DIGEST_PREFIX):
            continue
        # A name that points elsewhere keeps its history, by which the digest is still found.
        record = catalogue.records.get(name)
        points_there = record is not None and record.current and record.current.digest == mine
        keeps = digest == mine or (digest is not None and not points_there)
        if not keeps and catalogue.names_of(mine) == {name}:
            return mine
    return None
