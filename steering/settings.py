"""The settings that a request may choose for an intervention. Imports no torch."""

from ctypes import c_float
from dataclasses import dataclass
from typing import Literal, TypeAlias

Positions: TypeAlias = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, slots=True)
class AffineSettings:
    """The settings that a request may choose for an affine intervention.

    `positions` names the tokens that are edited, relative to the request's own prompt.
    """

    strength: float
    positions: Positions = "all"

    @property
    def does_nothing(self) -> bool:
        """True if the edit is the identity; the request is then served as if without it."""
        return is_zero(self.strength)


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """The settings that a request may choose for a reward intervention."""

    eta: float
    iterations: int
    direction_scale: float = 1.0

    @property
    def does_nothing(self) -> bool:
        """True if the edit is the identity; the request is then served as if without it."""
        refines = self.iterations > 0 and not is_zero(self.eta)
        return is_zero(self.direction_scale) and not refines


def is_zero(value: float) -> bool:
    """Return whether a value is zero in float32, the dtype in which edits are computed."""
    return c_float(value).value == 0


@dataclass(frozen=True, slots=True)
class SlottedEdit:
    """One edit of a request: the bank's slot that holds its parameters, and its settings."""

    slot: int
    settings: AffineSettings | RewardSettings
