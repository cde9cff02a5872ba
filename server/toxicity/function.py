"""Scores texts with a Python function of the operator's: `python:<module>:<function>`.

The function takes a list of texts and returns their toxicity, a number from 0 to 1 for each, in
their order. It is imported from the installed packages and from PYTHONPATH.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat, TypeAlias

from server.toxicity.scorer import ScoringError, check_scores

Function: TypeAlias = Callable[[list[str]], Iterable[SupportsFloat]]


class FunctionScorer:
    """Scores texts by calling a function."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `Backend.score`."""
        # The scores may be numpy's or torch's numbers.
        return check_scores([float(score) for score in self._function(list(texts))], len(texts))


def load(target: str) -> FunctionScorer:
    """Import the function that `<module>:<function>` names.

    Raises:
        ScoringError: there is no such module, or it has no such function.
        Exception: any error of the module's own.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScoringError(f"cannot import the toxicity scorer {target!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ScoringError(f"the module {module_name!r} has no function {name!r}")
    return FunctionScorer(function)
