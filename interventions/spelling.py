"""Which of the known names a misspelt one was meant to be."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Final

LONGEST_NAME: Final = 100  # characters; comparing takes time that grows with their square


def nearest_name(name: str, known: Collection[str], likeness: float = 0.6) -> str | None:
    """Find the known name that resembles `name` most.

    Args:
        likeness: the least that it must resemble `name`, 1 being equal.

    Returns:
        None where none resembles it, or where it is longer than any name would be.
    """
    if len(name) > LONGEST_NAME:
        return None
    return next(iter(get_close_matches(name, known, n=1, cutoff=likeness)), None)
