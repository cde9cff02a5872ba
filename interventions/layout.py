"""Maps parameters to an artifact's tensors, and checks the tensors' names and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from interventions.header import ArtifactError, ArtifactLimits
from interventions.manifest import AffineManifest, Manifest
from interventions.site_tensors import Shape, shape_text, site_tensors, site_widths
from steering.affine import AffineParameters
from steering.reward import RewardHead
from steering.stored import HEAD_TENSORS


@dataclass(frozen=True, slots=True)
class AffineShapes:
    """The widths of affine maps, by site (see `steering.sites`)."""

    site_widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RewardShapes:
    """The size of a reward head: `units` (m) hidden units, hidden states of `width` (d)."""

    units: int
    width: int


Shapes: TypeAlias = AffineShapes | RewardShapes


def shapes_of(parameters: AffineParameters | RewardHead) -> Shapes:
    """Return the shapes of loaded parameters."""
    if isinstance(parameters, RewardHead):
        units, width = parameters.w1.shape
        return RewardShapes(units, width)
    return AffineShapes({site: part.weight.numel() for site, part in parameters.items()})


def check_layout(
    manifest: Manifest, tensors: Mapping[str, Shape], limits: ArtifactLimits
) -> Shapes:
    """Check that the tensors are those that the manifest's kind has, and fit together.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of a wrong shape; a site's name is not
            valid; or there are too many sites or hidden units.
    """
    if isinstance(manifest, AffineManifest):
        return AffineShapes(site_widths(tensors, limits.max_sites))
    return _check_head(tensors, limits)


def to_tensors(parameters: AffineParameters | RewardHead) -> dict[str, Tensor]:
    """Return the tensors to store for parameters, by name, in the format's shapes.

    Raises:
        ArtifactError: two tensors would have one name, or a map's tensors have wrong shapes.
    """
    if isinstance(parameters, RewardHead):
        return {
            "head.0.weight": parameters.w1,
            "head.0.bias": parameters.b1,
            "head.2.weight": parameters.w2.reshape(1, -1),
            "head.2.bias": parameters.b2.reshape(1),
            "direction": parameters.direction,
            "positive_reward": parameters.positive_reward.reshape(()),
        }
    return site_tensors(parameters)


def _check_head(tensors: Mapping[str, Shape], limits: ArtifactLimits) -> RewardShapes:
    for name in tensors:
        if name not in HEAD_TENSORS:
            raise ArtifactError(f"A reward artifact has no tensor called {name[:300]!r}.")
    for name in HEAD_TENSORS:
        if name not in tensors:
            raise ArtifactError(f'The artifact lacks the tensor "{name}".')
    first = tensors["head.0.weight"]
    if len(first) != 2 or 0 in first:
        raise ArtifactError(f'"head.0.weight" has shape {shape_text(first)}; expected (m, d).')
    units, width = first
    if units > limits.max_head_units:
        raise ArtifactError(
            f"The head has {units} hidden units; the limit is {limits.max_head_units}."
        )
    expected = ((units, width), (units,), (1, units), (1,), (width,), ())
    for name, shape in zip(HEAD_TENSORS, expected, strict=True):
        if tensors[name] != shape:
            raise ArtifactError(
                f'"{name}" has shape {shape_text(tensors[name])}; expected {shape_text(shape)}.'
            )
    return RewardShapes(units, width)
