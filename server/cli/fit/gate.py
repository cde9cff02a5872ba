"""`steerserve fit gate` gives the maps of an artifact gates; the maps stay as they are."""

from pathlib import Path
from typing import Annotated

import typer

from interventions.artifact import Artifact, read_artifact
from interventions.compatibility import IncompatibleArtifactError, check_compatible
from interventions.manifest import AffineManifest
from server.cli.fit import gate_options, gating, output, strengths
from server.cli.fit.manifest_fields import manifest_fields, provenance
from server.cli.fit.options import AsJson, Device, Dtype, MaxTokens, Model, Name, Out, Seed, Threads
from server.cli.fit.training_files import read_lines
from server.engine.torch.model.loader import LoadedModel
from steering.affine import AffineParameters
from steering.fit.gate_settings import GateSettings
from steering.reward import RewardHead
from steering.sites import match_sites


def gate(
    artifact: Annotated[
        Path, typer.Argument(help="Artifact whose maps get gates; gates that it has are replaced.")
    ],
    model: Model,
    source: Annotated[Path, typer.Option(help="File of sentences to edit, one per line.")],
    control: gate_options.Control,
    out: Out,
    gate_components: gate_options.GateComponents = 5,
    gate_l2: gate_options.GateL2 = 1.0,
    gate_pooling: gate_options.GatePooling = "mean",
    gate_held_out: gate_options.GateHeldOut = 0.2,
    gate_min_accuracy: gate_options.GateMinAccuracy = 0.0,
    strength: strengths.KeptStrength = None,
    max_strength: strengths.KeptMaxStrength = None,
    name: Name = None,
    description: Annotated[
        str | None, typer.Option(help="Description for the manifest; if unset, the artifact's.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="Licence, as an SPDX identifier; if unset, the artifact's."),
    ] = None,
    seed: Seed = 0,
    max_tokens: MaxTokens = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit gates (DSAS) that open on SOURCE and close on CONTROL, for the maps of ARTIFACT."""
    with output.user_errors_explained():
        settings = GateSettings(gate_components, gate_l2, gate_held_out, seed, gate_pooling)
        original = read_artifact(artifact)
        manifest, maps = _maps_of(original, artifact)
        fields = manifest_fields(
            out,
            name,
            manifest.description if description is None else description,
            manifest.license if license_ is None else license_,
        )
        fields |= _strengths(manifest, strength, max_strength)
        source_file = read_lines(source)
        plan = gating.GatePlan("regression", read_lines(control), settings, gate_min_accuracy)
        loaded = output.load(model, dtype, device, threads)
        _check_model(original, loaded)
        sentences = output.tokenize_lines(loaded, source_file, max_tokens)
        # In the order of the layers, in which the manifest lists them.
        sites = match_sites(".*", maps)
        gates = gating.fit(loaded, sites, sentences, plan, max_tokens)
        training = {
            key: value for key, value in manifest.training.items() if not key.startswith("gate")
        }
        gated = gates.put_on(maps)
        if "sites_kept" in training:
            training |= gating.kept_by_gates(gated)
        updated = manifest.model_copy(
            update={
                **fields,
                "training": {
                    **training,
                    "gate_maps": f"sha256:{original.digest}",
                    "gate_source": source_file.name,
                    "gate_source_sha256": source_file.sha256,
                    "gate_max_tokens": max_tokens,
                    **gates.training,
                    **{f"gate_{key}": value for key, value in provenance(loaded).items()},
                },
            }
        )
        output.write(out, updated, gated, gates.figures, as_json)


def _maps_of(artifact: Artifact, path: Path) -> tuple[AffineManifest, AffineParameters]:
    manifest, parameters = artifact.manifest, artifact.parameters
    if not isinstance(manifest, AffineManifest) or isinstance(parameters, RewardHead):
        raise output.FitCommandError(
            f"{path} is of kind {manifest.kind}: only affine maps have gates"
        )
    return manifest, parameters


def _strengths(
    manifest: AffineManifest, strength: float | None, max_strength: float | None
) -> dict[str, object]:
    """Return the manifest's defaults and limits with the given ones in them."""
    default = manifest.defaults.strength if strength is None else strength
    limits = manifest.limits.strength
    if max_strength is None:
        strengths.check_default(default, limits)
    else:
        limits = strengths.limits(default, max_strength, negative=limits[0] < 0)
    return {
        "defaults": manifest.defaults.model_copy(update={"strength": default}),
        "limits": manifest.limits.model_copy(update={"strength": limits}),
    }


def _check_model(artifact: Artifact, loaded: LoadedModel) -> None:
    try:
        warnings = check_compatible(artifact, loaded.description)
    except IncompatibleArtifactError as error:
        raise output.FitCommandError(str(error)) from error
    for warning in warnings:
        output.warn(warning)
