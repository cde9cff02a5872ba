"""Finds the known name that a misspelt name was meant to be."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Final

LONGEST_NAME: Final = 100  # characters; comparing takes time that grows with their square


def nearest_name(name: str, known: Collection[str], likeness: float = 0.6) -> str | None:
    """Return the known name that resembles `name` most.

    Args:
        likeness: the least resemblance, 0 to 1; 1 means equal.

    Returns:
        None if no name resembles `name`, or if `name` is longer than LONGEST_NAME.
    """
    if len(name) > LONGEST_NAME:
        return None
    return next(iter(get_close_matches(name, known, n=1, cutoff=likeness)), None)
