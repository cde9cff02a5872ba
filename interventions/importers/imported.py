"""Defines the result of reading another project's file, and the error of a refused file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from interventions.manifest import TrainingValue
from steering.affine import AffineParameters
from steering.reward import RewardHead

UNIT_STRENGTH: Final = (0.0, 1.0)
"""The strengths between a transport map and the identity."""

VECTOR_STRENGTH: Final = (-10.0, 10.0)
"""The strengths of a vector, which may also be subtracted."""


class ImportFileError(ValueError):
    """The file cannot be imported; the message is a sentence that names the file."""


@dataclass(frozen=True, slots=True, eq=False)
class ImportedMaps:
    """Affine maps, and the part of their manifest that follows from the file."""

    parameters: AffineParameters
    method: str
    strength: tuple[float, float]  # limits, both included
    training: Mapping[str, TrainingValue]


@dataclass(frozen=True, slots=True, eq=False)
class ImportedHead:
    """A reward head, and the part of its manifest that follows from the files."""

    parameters: RewardHead
    training: Mapping[str, TrainingValue]
