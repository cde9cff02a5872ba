"""Fits interventions: learns the parameters that are served, from token ids and a loaded model."""

from collections.abc import Callable
from typing import TypeAlias

OnStep: TypeAlias = Callable[[int, int, float], None]
"""Called after each step with its number (from 1), the number of all steps, and its loss."""


class FitError(ValueError):
    """A fit cannot be done, or went wrong; the message says why."""
