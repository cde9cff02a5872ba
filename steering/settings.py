"""What a request may choose of an intervention. Imports nothing, so that bookkeeping may use it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Positions: TypeAlias = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, slots=True)
class AffineSettings:
    """What a request may choose of an affine intervention.

    `positions` names the tokens that are edited, relative to the request's own prompt.
    """

    strength: float
    positions: Positions = "all"

    @property
    def does_nothing(self) -> bool:
        """Whether the edit is the identity, so that the request is served as if without it."""
        return self.strength == 0


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """What a request may choose of a reward intervention."""

    eta: float
    iterations: int
    direction_scale: float = 1.0

    @property
    def does_nothing(self) -> bool:
        """Whether the edit is the identity, so that the request is served as if without it."""
        return self.direction_scale == 0 and (self.eta == 0 or self.iterations == 0)


Settings: TypeAlias = AffineSettings | RewardSettings


@dataclass(frozen=True, slots=True)
class SlottedEdit:
    """One edit of a request, by the bank's slot that holds its parameters."""

    slot: int
    settings: Settings
