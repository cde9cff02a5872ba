"""Defines the manifest of an artifact: kind, base model, default settings and their limits."""

import re
from datetime import datetime
from typing import Annotated, Final, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from interventions.strict_json import StrictJSONError, parse_json
from steering.settings import Positions

NAME_PATTERN: Final = re.compile(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")
"""The names that an intervention may have."""

DIGEST_PATTERN: Final = re.compile(r"\A[0-9a-f]{64}\Z")
"""A sha256 of an artifact's bytes, hexadecimal, without the prefix `sha256:`."""

MOST_IN_DESCRIPTION: Final = 10_000
"""Characters that a description may have."""

MOST_IN_LABEL: Final = 300
"""Characters that the licence may have, and each text that says which the base model is."""

Number = TypeVar("Number", int, float)

_RFC3339: Final = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d{1,6})?([Zz]|[+-]\d{2}:\d{2})"
)


class ManifestError(ValueError):
    """The manifest is not accepted; the message is a sentence, and names a field that is wrong."""


def _ordered(limits: tuple[Number, Number]) -> tuple[Number, Number]:
    if limits[0] > limits[1]:
        raise ValueError(f"its minimum {limits[0]:g} exceeds its maximum {limits[1]:g}")
    return limits


def _rfc3339(value: object) -> datetime:
    # pydantic alone would also take a Unix timestamp, as a string of digits.
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise ValueError("it must be a date and time with its offset, as 2026-11-21T20:41:00Z")
    return datetime.fromisoformat(value.upper())


Range: TypeAlias = Annotated[tuple[float, float], AfterValidator(_ordered)]
CountRange: TypeAlias = Annotated[tuple[NonNegativeInt, NonNegativeInt], AfterValidator(_ordered)]
Label: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=MOST_IN_LABEL)]
TrainingValue: TypeAlias = int | float | str | bool | None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BaseModelReference(_Strict):
    """The model whose activations the intervention was fitted on."""

    id: Label
    architecture: Label
    hidden_size: PositiveInt
    num_layers: PositiveInt
    vocab_size: PositiveInt
    fingerprint: Label | None = None


class AffineDefaults(_Strict):
    """The value of each setting that a request does not give."""

    strength: float
    positions: Positions = "all"


class AffineLimits(_Strict):
    """The range of each numeric setting, both ends included."""

    strength: Range = (0.0, 1.0)


class RewardDefaults(_Strict):
    """The value of each setting that a request does not give."""

    eta: float
    iterations: NonNegativeInt
    direction_scale: float = 1.0


class RewardLimits(_Strict):
    """The range of each setting, both ends included."""

    eta: Range = (0.0, 10.0)
    iterations: CountRange = (0, 64)
    direction_scale: Range = (0.0, 10.0)


class _Common(_Strict):
    format: Literal["steerserve/1"]
    method: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    description: Annotated[str, StringConstraints(max_length=MOST_IN_DESCRIPTION)]
    created: Annotated[AwareDatetime, BeforeValidator(_rfc3339)]
    license: Label
    base_model: BaseModelReference
    training: dict[str, TrainingValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _defaults_lie_inside_limits(self) -> Self:
        fields = dict(self)
        for field, (low, high) in fields["limits"]:
            value = getattr(fields["defaults"], field)
            if not low <= value <= high:
                raise ValueError(
                    f'"defaults.{field}" is {value:g}, outside of "limits.{field}" '
                    f"[{low:g}, {high:g}]"
                )
        return self


class AffineManifest(_Common):
    """The manifest of affine maps (LinEAS, Lin-AcT, mean shift, CAA)."""

    kind: Literal["affine"]
    defaults: AffineDefaults
    limits: AffineLimits = AffineLimits()


class RewardManifest(_Common):
    """The manifest of a reward head (ARGRE)."""

    kind: Literal["reward"]
    defaults: RewardDefaults
    limits: RewardLimits = RewardLimits()


Manifest: TypeAlias = Annotated[AffineManifest | RewardManifest, Field(discriminator="kind")]

_ADAPTER: Final[TypeAdapter[AffineManifest | RewardManifest]] = TypeAdapter(Manifest)


def parse_manifest(text: str) -> Manifest:
    """Read a manifest from its JSON.

    Raises:
        ManifestError: the text is not JSON or not a manifest of this version.
    """
    try:
        parse_json(text)
    except StrictJSONError as error:
        raise ManifestError(f"The manifest {error}.") from error
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ManifestError(_sentence(error)) from error


def manifest_text(manifest: Manifest) -> str:
    """Return the manifest as JSON, its fields in a fixed order and `training` in the given one."""
    return manifest.model_dump_json()


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    # The first part of the location is the union's tag, which is no field of the manifest.
    places = [str(place)[:100] for place in first["loc"][1:]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"].startswith("union_tag"):
        return 'The manifest\'s field "kind" must be "affine" or "reward".'
    if not places:
        return f"The manifest is not valid: {message}."
    if places[0] == "training" and len(places) > 1:
        # pydantic reports an error for each member of the union; one sentence is enough.
        places = places[:2]
        message = "it must be a finite number, a string, true, false or null"
    field = ".".join(places)
    if first["type"] == "missing":
        return f'The manifest lacks the field "{field}".'
    if first["type"] == "extra_forbidden":
        return f'The manifest has an unknown field "{field}".'
    return f'The manifest\'s field "{field}" is not valid: {message[0].lower()}{message[1:]}.'
