"""Checks the settings that a request gives for an intervention, and fills in the defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from interventions.manifest import AffineManifest, Manifest
from interventions.spelling import nearest_name
from steering.settings import AffineSettings, Positions, RewardSettings

AFFINE_SETTINGS: Final[tuple[str, ...]] = ("strength", "positions")
REWARD_SETTINGS: Final[tuple[str, ...]] = ("eta", "iterations", "direction_scale")


class InvalidSettingError(ValueError):
    """A setting is not accepted; `field` is its name as the request wrote it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class Caps:
    """The server's own range of each setting, ends included, which no manifest widens."""

    strength: tuple[float, float] = (-100.0, 100.0)
    eta: tuple[float, float] = (-100.0, 100.0)
    iterations: tuple[int, int] = (0, 64)
    direction_scale: tuple[float, float] = (-100.0, 100.0)


def resolve_settings(
    manifest: Manifest, requested: Mapping[str, object], caps: Caps
) -> AffineSettings | RewardSettings:
    """Check the settings that a request gives, and take the manifest's defaults for the others.

    Raises:
        InvalidSettingError: a setting is unknown, of the other kind, of a wrong type, not finite,
            or outside the manifest's limits or the server's caps. A default outside the caps is
            refused too.
    """
    _check_names(manifest, requested)
    if isinstance(manifest, AffineManifest):
        affine, limits = manifest.defaults.model_copy(update=requested), manifest.limits
        return AffineSettings(
            _number("strength", affine.strength, limits.strength, caps.strength),
            _positions(affine.positions),
        )
    reward, ranges = manifest.defaults.model_copy(update=requested), manifest.limits
    return RewardSettings(
        _number("eta", reward.eta, ranges.eta, caps.eta),
        _count("iterations", reward.iterations, ranges.iterations, caps.iterations),
        _number(
            "direction_scale", reward.direction_scale, ranges.direction_scale, caps.direction_scale
        ),
    )


def _check_names(manifest: Manifest, requested: Mapping[str, object]) -> None:
    if isinstance(manifest, AffineManifest):
        own, others, other_kind = AFFINE_SETTINGS, REWARD_SETTINGS, "reward"
    else:
        own, others, other_kind = REWARD_SETTINGS, AFFINE_SETTINGS, "affine"
    for field in requested:
        if field in own:
            continue
        if field in others:
            raise InvalidSettingError(
                field,
                f'"{field}" is a setting of {other_kind} interventions; '
                f'"{manifest.name}" is of kind {manifest.kind} and takes {_quoted(own)}.',
            )
        nearest = nearest_name(field, own)
        hint = f'did you mean "{nearest}"?' if nearest else f"it takes {_quoted(own)}."
        raise InvalidSettingError(
            field, f'"{field[:100]}" is not a setting of "{manifest.name}"; {hint}'
        )


def _number(
    field: str, value: object, limits: tuple[float, float], caps: tuple[float, float]
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidSettingError(field, f'"{field}" must be a number, not {_described(value)}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidSettingError(field, f'"{field}" must be a finite number, not {value}.')
    _check_range(field, value, limits, caps)
    return float(value)


def _count(field: str, value: object, limits: tuple[int, int], caps: tuple[int, int]) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSettingError(field, f'"{field}" must be an integer, not {_described(value)}.')
    _check_range(field, value, limits, caps)
    return value


def _positions(value: object) -> Positions:
    known: tuple[Positions, ...] = get_args(Positions)
    for positions in known:
        if value == positions:
            return positions
    raise InvalidSettingError(
        "positions", f'"positions" must be one of {_quoted(known)}, not {_described(value)}.'
    )


def _check_range(
    field: str, value: float, limits: tuple[float, float], caps: tuple[float, float]
) -> None:
    low, high = max(limits[0], caps[0]), min(limits[1], caps[1])
    if low > high:
        raise InvalidSettingError(
            field,
            f'"{field}" cannot be set: the intervention allows [{limits[0]:g}, {limits[1]:g}], '
            f"this server only [{caps[0]:g}, {caps[1]:g}].",
        )
    if not low <= value <= high:
        # An integer may have more digits than Python prints.
        shown = f"{value:g}" if abs(value) < 1e300 else "a huge number"
        raise InvalidSettingError(
            field, f'"{field}" must lie in [{low:g}, {high:g}]; it is {shown}.'
        )


def _described(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'the string "{value[:100]}"'
    return str(value) if isinstance(value, float) else f"of type {type(value).__name__}"


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)
