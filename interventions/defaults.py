"""Keeps the names that a server's default steering needs, at every server of a registry."""

from collections.abc import Mapping

from interventions.catalogue import DIGEST_PREFIX, Catalogue
from interventions.errors import NameInUseError, RegistryBusyError
from interventions.leases import Leases


def check_default(leases: Leases, catalogue: Catalogue, name: str, digest: str | None) -> None:
    """Refuse a change that takes a server's default steering its name.

    Args:
        leases: of all servers. The registry is locked.
        catalogue: what the registry holds before the change.
        name: the name that changes.
        digest: what it shall point to; None where it shall be deleted.

    Raises:
        NameInUseError: a default was given by this name, or its artifact has no other name.
        RegistryBusyError: a server's lease cannot be read.
    """
    if (needed := _lost(leases.own.default, catalogue, name, digest)) is not None:
        raise NameInUseError(name, needed, None, deleting=digest is None)
    for lease in leases.others().values():
        if lease is None:
            raise RegistryBusyError(
                "The lease of another server of this registry cannot be read now, so what its "
                "default steering needs is not known; nothing was changed."
            )
        if (needed := _lost(lease.default, catalogue, name, digest)) is not None:
            raise NameInUseError(name, needed, lease.where, deleting=digest is None)


def _lost(
    default: Mapping[str, str], catalogue: Catalogue, name: str, digest: str | None
) -> str | None:
    """Tell the digest of a default that would lose its name by a change; None if none would."""
    if name in default:
        return None if digest == default[name] else default[name]
    for reference, mine in default.items():
        if not reference.startswith(DIGEST_PREFIX):
            continue
        # A name that moves on keeps its history, by which a digest is still found.
        record = catalogue.records.get(name)
        points_there = record is not None and record.current and record.current.digest == mine
        keeps = digest == mine or (digest is not None and not points_there)
        if not keeps and catalogue.names_of(mine) == {name}:
            return mine
    return None
