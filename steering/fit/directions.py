"""Finds the direction from unwanted to wanted text, from the last tokens' hidden states.

"Detoxifying Large Language Models via Autoregressive Reward Guided Representation Editing"
(NeurIPS 2025) takes the first principal component of the differences between the last tokens of a
pair's two texts. The authors' released code (github.com/xiaoyisong/ARGRE) in effect takes the mean
difference: it hands its PCA one difference at a time, which minus its own mean is zero, and adds
the resulting unit vector, which says nothing about the data, to the mean. That vector is left out.
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from steering.fit import FitError

DirectionName: TypeAlias = Literal["mean-difference", "principal-component"]
DIRECTION_NAMES: tuple[str, ...] = get_args(DirectionName)


def find_direction(differences: Tensor, name: DirectionName) -> Tensor:
    """Return the direction of this name, from differences of positive minus negative.

    Args:
        differences: (pairs, width) float32; at least one pair.
        name: `mean-difference` has the mean's length, `principal-component` the length 1.

    Returns:
        (width,) float32.

    Raises:
        FitError: the differences have no such direction.
    """
    if name == "principal-component":
        return principal_direction(differences)
    return mean_direction(differences)


def mean_direction(differences: Tensor) -> Tensor:
    """Return the mean difference, not normalised: (pairs, width) -> (width,) float32.

    Raises:
        FitError: the mean is zero.
    """
    mean = differences.mean(dim=0)
    if not mean.norm() > 0:
        raise FitError("positives and negatives end in the same hidden states: no direction")
    return mean


def principal_direction(differences: Tensor) -> Tensor:
    """Return the first principal component of the differences: (pairs, width) -> (width,) float32.

    The differences' mean is subtracted first, as in any PCA. A principal component has no sign of
    its own: it is turned so that positives lie further along it than negatives, in the mean.

    Raises:
        FitError: all differences are equal, or their mean is perpendicular to the component.
    """
    mean = differences.mean(dim=0)
    centered = differences - mean
    if not centered.norm() > 0:
        raise FitError(
            "the differences of all pairs are equal and have no principal component: fit on more "
            "pairs, or along the mean difference"
        )
    component: Tensor = torch.linalg.svd(centered, full_matrices=False).Vh[0]
    along = component @ mean
    if along == 0:
        raise FitError("positives lie no further along the principal component than negatives")
    return component if along > 0 else -component
