"""Which of the known names a misspelt one was meant to be."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Final

_LONGEST: Final = 100  # characters; comparing takes time that grows with their square


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """Find the known name that resembles `name` most.

    Returns:
        None where none resembles it, or where it is longer than any name would be.
    """
    if len(name) > _LONGEST:
        return None
    return next(iter(get_close_matches(name, known, n=1)), None)
