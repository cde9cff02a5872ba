"""Which tensors an artifact of each kind holds: their names and shapes, and the way back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor

from interventions.header import ArtifactError, ArtifactLimits
from interventions.manifest import AffineManifest, Manifest
from steering.affine import AffineMap, AffineParameters
from steering.reward import RewardHead

_SITE_PATTERN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_MAX_SITE_LENGTH: Final = 300
_SITE_PREFIX: Final = "sites."
_SITE_PARTS: Final = ("weight", "bias", "low", "high")
_HEAD_TENSORS: Final = (
    "head.0.weight",
    "head.0.bias",
    "head.2.weight",
    "head.2.bias",
    "direction",
    "positive_reward",
)


@dataclass(frozen=True, slots=True)
class AffineShapes:
    """The sites of affine maps: module path -> width."""

    site_widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RewardShapes:
    """The size of a reward head: m hidden units over states of width d."""

    units: int
    width: int


Shapes: TypeAlias = AffineShapes | RewardShapes


def shapes_of(parameters: AffineParameters | RewardHead) -> Shapes:
    """The shapes of loaded parameters."""
    if isinstance(parameters, RewardHead):
        units, width = parameters.w1.shape
        return RewardShapes(units, width)
    return AffineShapes({site: part.weight.numel() for site, part in parameters.items()})


def check_layout(
    manifest: Manifest, tensors: Mapping[str, tuple[int, ...]], limits: ArtifactLimits
) -> Shapes:
    """Check that the tensors are exactly those that the manifest's kind has, and fit together.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of a wrong shape; a site's name is no
            module path; or there are too many sites or hidden units.
    """
    if isinstance(manifest, AffineManifest):
        return _check_sites(tensors, limits)
    return _check_head(tensors, limits)


def to_tensors(parameters: AffineParameters | RewardHead) -> dict[str, Tensor]:
    """The stored form of parameters: tensor name -> tensor, with the shapes of the format."""
    if isinstance(parameters, RewardHead):
        return {
            "head.0.weight": parameters.w1,
            "head.0.bias": parameters.b1,
            "head.2.weight": parameters.w2.reshape(1, -1),
            "head.2.bias": parameters.b2.reshape(1),
            "direction": parameters.direction,
            "positive_reward": parameters.positive_reward.reshape(()),
        }
    tensors: dict[str, Tensor] = {}
    for site, part in parameters.items():
        named = (part.weight, part.bias, part.low, part.high)
        for name, tensor in zip(_SITE_PARTS, named, strict=True):
            if tensor is not None:
                tensors[f"{_SITE_PREFIX}{site}.{name}"] = tensor
    return tensors


def to_parameters(shapes: Shapes, tensors: Mapping[str, Tensor]) -> AffineParameters | RewardHead:
    """The parameters from tensors whose layout was checked."""
    if isinstance(shapes, RewardShapes):
        return RewardHead(
            w1=tensors["head.0.weight"],
            b1=tensors["head.0.bias"],
            w2=tensors["head.2.weight"].reshape(shapes.units),
            b2=tensors["head.2.bias"].reshape(()),
            direction=tensors["direction"],
            positive_reward=tensors["positive_reward"],
        )
    return {
        site: AffineMap(
            weight=tensors[f"{_SITE_PREFIX}{site}.weight"],
            bias=tensors[f"{_SITE_PREFIX}{site}.bias"],
            low=tensors.get(f"{_SITE_PREFIX}{site}.low"),
            high=tensors.get(f"{_SITE_PREFIX}{site}.high"),
        )
        for site in shapes.site_widths
    }


def _check_sites(tensors: Mapping[str, tuple[int, ...]], limits: ArtifactLimits) -> AffineShapes:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        site, part = _split_site(name)
        parts.setdefault(site, {})[part] = shape
    if not parts:
        raise ArtifactError("The artifact holds no site.")
    if len(parts) > limits.max_sites:
        raise ArtifactError(
            f"The artifact holds {len(parts)} sites; the limit is {limits.max_sites}."
        )
    return AffineShapes({site: _site_width(site, parts[site]) for site in sorted(parts)})


def _split_site(name: str) -> tuple[str, str]:
    site, _, part = name.removeprefix(_SITE_PREFIX).rpartition(".")
    if not name.startswith(_SITE_PREFIX) or part not in _SITE_PARTS:
        raise ArtifactError(f"An affine artifact has no tensor called {name[:300]!r}.")
    if len(site) > _MAX_SITE_LENGTH or not _SITE_PATTERN.fullmatch(site):
        raise ArtifactError(f"The site {site[:300]!r} is not the path of a module.")
    return site, part


def _site_width(site: str, parts: Mapping[str, tuple[int, ...]]) -> int:
    for part in ("weight", "bias"):
        if part not in parts:
            raise ArtifactError(f'The site "{site}" has no {part}.')
    if ("low" in parts) != ("high" in parts):
        raise ArtifactError(f'The site "{site}" has only one of low and high.')
    shape = parts["weight"]
    if len(shape) != 1 or shape[0] == 0:
        raise ArtifactError(
            f'The weight of site "{site}" has shape {_shown(shape)}; expected one dimension.'
        )
    for part, other in parts.items():
        if other != shape:
            raise ArtifactError(
                f'The {part} of site "{site}" has shape {_shown(other)}; its weight has '
                f"{_shown(shape)}."
            )
    return shape[0]


def _check_head(tensors: Mapping[str, tuple[int, ...]], limits: ArtifactLimits) -> RewardShapes:
    for name in tensors:
        if name not in _HEAD_TENSORS:
            raise ArtifactError(f"A reward artifact has no tensor called {name[:300]!r}.")
    for name in _HEAD_TENSORS:
        if name not in tensors:
            raise ArtifactError(f'The artifact lacks the tensor "{name}".')
    first = tensors["head.0.weight"]
    if len(first) != 2 or 0 in first:
        raise ArtifactError(f'"head.0.weight" has shape {_shown(first)}; expected (m, d).')
    units, width = first
    if units > limits.max_head_units:
        raise ArtifactError(
            f"The head has {units} hidden units; the limit is {limits.max_head_units}."
        )
    expected = ((units, width), (units,), (1, units), (1,), (width,), ())
    for name, shape in zip(_HEAD_TENSORS, expected, strict=True):
        if tensors[name] != shape:
            raise ArtifactError(
                f'"{name}" has shape {_shown(tensors[name])}; expected {_shown(shape)}.'
            )
    return RewardShapes(units, width)


def _shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
