"""Describes the model of an imported file, and writes the artifact."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from interventions.importers.imported import ImportedHead, ImportedMaps
from interventions.importers.recognise import import_command
from interventions.manifest import (
    AffineDefaults,
    AffineLimits,
    AffineManifest,
    BaseModelReference,
    RewardDefaults,
    RewardManifest,
    TrainingValue,
)
from interventions.model import ModelDescription
from server.cli.fit import output, strengths
from server.cli.fit.manifest_fields import manifest_fields
from server.engine.model.unloaded import describe_unloaded
from server.version import installed_version


@dataclass(frozen=True, slots=True)
class ChosenStrengths:
    """The strength of requests that give none, and the greatest that requests may ask for."""

    default: float
    greatest: float | None  # None: that of the imported maps


def checked_fields(
    out: Path, name: str | None, description: str, license_: str
) -> Mapping[str, Any]:
    """Check the options, and return the manifest's fields from them; see `manifest_fields`.

    Raises:
        FitCommandError: an option is wrong, or a file of another project would be overwritten.
    """
    fields = manifest_fields(out, name, description, license_)
    if import_command(out) is not None:
        raise output.FitCommandError(
            f"--out is another project's file, which would be overwritten: {out}"
        )
    return fields


def describe(model: str) -> ModelDescription:
    """Describe the model without loading its weights."""
    console = Console(stderr=True, highlight=False)
    return describe_unloaded(
        model,
        "auto",
        "cpu",
        lambda sentence: console.print(f"steerserve: {sentence}", markup=False, soft_wrap=True),
    ).description


def write_maps(
    out: Path,
    fields: Mapping[str, Any],
    model: ModelDescription,
    imported: ImportedMaps,
    source: str,
    chosen: ChosenStrengths,
    as_json: bool,
) -> None:
    """Write imported maps as an artifact, and print a summary.

    Args:
        out: the artifact.
        fields: the manifest's fields that the options give.
        model: the one that the maps are for.
        imported: the maps.
        source: the project that wrote the file.
        chosen: what the options say of its strengths.
        as_json: True to print JSON, for machines.

    Raises:
        FitCommandError: the default strength lies outside of its limits.
        ArtifactError: the maps make no valid artifact.
        OSError: the artifact cannot be written.
    """
    low, high = imported.strength
    greatest = high if chosen.greatest is None else chosen.greatest
    limits = strengths.limits(chosen.default, greatest, negative=low < 0)
    manifest = AffineManifest(
        **fields,
        kind="affine",
        method=imported.method,
        base_model=_reference(model),
        defaults=AffineDefaults(strength=chosen.default),
        limits=AffineLimits(strength=limits),
        training=_training(source, imported.training),
    )
    output.write(out, manifest, imported.parameters, {"sites": len(imported.parameters)}, as_json)


def write_head(
    out: Path,
    fields: Mapping[str, Any],
    model: ModelDescription,
    imported: ImportedHead,
    defaults: RewardDefaults,
    as_json: bool,
) -> None:
    """Write an imported reward head as an artifact, and print a summary.

    Args and errors are those of `write_maps`.
    """
    head = imported.parameters
    manifest = RewardManifest(
        **fields,
        kind="reward",
        method="argre",
        base_model=_reference(model),
        defaults=defaults,
        training=_training("ARGRE", imported.training),
    )
    units, width = head.w1.shape
    figures = {
        "units": units,
        "width": width,
        "positive_reward": float(head.positive_reward),
        "direction_norm": float(head.direction.norm()),
    }
    output.write(out, manifest, head, figures, as_json)


def _reference(model: ModelDescription) -> BaseModelReference:
    return BaseModelReference.model_validate(model, from_attributes=True)


def _training(source: str, found: Mapping[str, TrainingValue]) -> dict[str, TrainingValue]:
    """Return the manifest's provenance; a file's name may hold bytes that are not UTF-8."""
    fields = {"imported_from": source, **found, "steerserve": installed_version()}
    return {
        key: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for key, value in fields.items()
    }
