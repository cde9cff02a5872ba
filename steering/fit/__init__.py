"""Fitting interventions: from token ids and a loaded model to the parameters that are served."""

from collections.abc import Callable
from typing import TypeAlias

OnStep: TypeAlias = Callable[[int, int, float], None]
"""Called after a step with its number, from 1; the number of all steps; and its loss."""


class FitError(ValueError):
    """A fit that cannot be done, or went wrong, with a sentence that says why."""
