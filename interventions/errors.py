"""Defines the registry's exceptions; each message is a sentence for the client."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# EFBIG, the limit of one file's size, counts as a full disk too.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_SHOWN_DIGITS: Final = 12  # of a digest


class RegistryError(Exception):
    """The registry cannot do what was asked; the message is a sentence that says why."""


class InvalidNameError(RegistryError):
    """Interventions may not have this name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:100]!r} is not a name: 1 to 64 of a-z, 0-9, '.', '_' and '-', the first a "
            "letter or digit."
        )
        self.name = name


class UnknownInterventionError(RegistryError):
    """Nothing is stored under a reference."""

    def __init__(self, reference: str, message: str | None = None) -> None:
        super().__init__(message or f'There is no intervention "{reference[:100]}".')
        self.reference = reference


class DamagedInterventionError(UnknownInterventionError):
    """The files of a stored intervention are damaged or missing."""

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(
            reference, f'The intervention "{reference[:100]}" is stored but damaged: {reason}'
        )


class NameInUseError(RegistryError):
    """The name cannot change, because a server's default steering needs it."""

    def __init__(self, name: str, digest: str, server: str | None, *, deleting: bool) -> None:
        """`digest` is the name's target; `server` says where the server runs, None for this one."""
        whose = "The server's" if server is None else "Another server's"
        where = "" if server is None else f" on {server}"
        until = "the server is" if server is None else "that server is"
        what = "be deleted" if deleting else "point to another artifact"
        super().__init__(
            f"{whose} default steering uses '{name}' (sha256:{digest[:_SHOWN_DIGITS]}…){where}: "
            f"the name cannot {what} until {until} started with another default."
        )


class RegistryBusyError(RegistryError):
    """Another server keeps this one from changing the registry now; nothing was changed."""


class RegistryUnreadableError(RegistryError):
    """The registry's folder cannot be read now. The message names no path."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"The registry's folder cannot be read: {error.strerror or 'it fails'}.")


class RegistryDiskError(RegistryError):
    """The registry's disk is full, read-only or failing. The message names no path.

    `full` is True if the disk is only full. `visible` is True if the change was made and only a
    power cut may undo it; otherwise nothing was changed.
    """

    def __init__(self, error: OSError, *, visible: bool = False) -> None:
        self.full = is_full(error)
        self.visible = visible
        reason = (
            "The registry's disk is full"
            if self.full
            else f"The registry's disk cannot be used: {error.strerror or 'it fails'}"
        )
        outcome = (
            "the change was made, but a power cut may undo it" if visible else "nothing was changed"
        )
        super().__init__(f"{reason}; {outcome}.")


def is_full(error: OSError) -> bool:
    """Tell whether an error means a full disk, an exhausted quota, or too large a file."""
    return error.errno in _NO_ROOM


@contextmanager
def disk_errors(*, visible: bool = False) -> Iterator[None]:
    """Turn an OSError of the block into a RegistryDiskError."""
    try:
        yield
    except OSError as error:
        raise RegistryDiskError(error, visible=visible) from error
