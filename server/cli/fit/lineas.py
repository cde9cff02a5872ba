"""`steerserve fit lineas` fits affine maps to two files of sentences."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from interventions.manifest import (
    AffineDefaults,
    AffineLimits,
    AffineManifest,
    BaseModelReference,
)
from server.cli.fit import gate_options, gating, output, strengths
from server.cli.fit.checkpoint import CheckpointFile, digest, removed_at_the_end
from server.cli.fit.manifest_fields import manifest_fields, provenance
from server.cli.fit.options import (
    AsJson,
    Description,
    Device,
    Dtype,
    License,
    MaxTokens,
    Model,
    Name,
    Out,
    Pooling,
    Seed,
    Source,
    Target,
    Threads,
    chosen_sites,
)
from server.cli.fit.training_files import read_sides
from steering.fit.activations import TokenIds
from steering.fit.gate_settings import GateSettings
from steering.fit.lineas import fit_lineas
from steering.fit.lineas_settings import LineasSettings, OptimizerName
from steering.sites import choose_sites, default_sites


def lineas(
    model: Model,
    source: Source,
    target: Target,
    out: Out,
    samples: Annotated[int, typer.Option(min=1, help="Sentences drawn from each file.")] = 32,
    target_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Sentences drawn from TARGET; if unset, as many as of SOURCE."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = "sgd",
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the first step; it decays to 0.")
    ] = 0.1,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="AdamW's decay of the maps towards the identity; if unset, 0.01."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sentences of each file in one optimizer step.")
    ] = 32,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sentences in one forward and backward pass, which bound the memory; if unset, "
            "the batch. The maps are the same, but a step takes about a third longer.",
        ),
    ] = None,
    pooling: Pooling = "mean",
    gamma: Annotated[
        float, typer.Option(help="Sparsity of the maps (sparse group lasso); 0 for none.")
    ] = 0.0,
    lambda_1: Annotated[
        float, typer.Option("--lambda-1", help="Weight of --gamma for single coordinates.")
    ] = 1.0,
    lambda_group: Annotated[float, typer.Option(help="Weight of --gamma for whole sites.")] = 1.0,
    gate: gate_options.GateChoice = "none",
    control: gate_options.OptionalControl = None,
    control_weight: gate_options.ControlWeight = 1.0,
    gate_components: gate_options.GateComponents = 5,
    gate_l2: gate_options.GateL2 = 1.0,
    gate_pooling: gate_options.GatePooling = "mean",
    gate_held_out: gate_options.GateHeldOut = 0.2,
    gate_min_accuracy: gate_options.GateMinAccuracy = 0.0,
    sites: Annotated[str | None, chosen_sites("the model family's default sites")] = None,
    strength: strengths.Strength = 1.0,
    max_strength: strengths.MaxStrength = 1.0,
    name: Name = None,
    description: Description = "",
    license_: License = "Apache-2.0",
    seed: Seed = 0,
    max_tokens: MaxTokens = 128,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps the state of the fit. If it exists, the fit goes on from it; "
            "after the artifact is written, it is removed."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps after which the state is written to --checkpoint.")
    ] = 20,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit LinEAS maps, which move the activations on SOURCE to the distribution on TARGET."""
    with output.user_errors_explained():
        fields = manifest_fields(out, name, description, license_)
        limits = strengths.limits(strength, max_strength)
        settings = LineasSettings(
            samples=samples,
            steps=steps,
            target_samples=target_samples,
            batch_size=batch_size,
            micro_batch=micro_batch,
            pooling=pooling,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            gamma=gamma,
            lambda_1=lambda_1,
            lambda_group=lambda_group,
            seed=seed,
        )
        gate_settings = GateSettings(gate_components, gate_l2, gate_held_out, seed, gate_pooling)
        plan = gating.plan_gates(gate, control, gate_settings, gate_min_accuracy, control_weight)
        kept = None if checkpoint is None else CheckpointFile(checkpoint, out, checkpoint_every)
        source_file, target_file = read_sides(source, target)
        loaded = output.load(model, dtype, device, threads)
        pattern = sites or default_sites(loaded.description.architecture)
        chosen = choose_sites(pattern, loaded.description.site_widths)
        source_tokens: Sequence[TokenIds] = output.tokenize_lines(loaded, source_file, max_tokens)
        target_tokens = output.tokenize_lines(loaded, target_file, max_tokens)
        gates = None
        if plan is not None:
            gates = gating.fit(loaded, chosen, source_tokens, plan, max_tokens)
            chosen = gates.sites_of_maps(chosen)
            source_tokens = gates.source_of_maps(source_tokens, samples)
        if kept is not None:
            kept.identify(
                steps,
                model=loaded.description.fingerprint,
                dtype=loaded.model.dtype,
                sites=chosen,
                source=digest(source_tokens),
                target=digest(target_tokens),
                **asdict(settings),
                **({} if gates is None else gates.identity),
            )
        with removed_at_the_end(kept):
            with output.progress("learning maps") as advance:
                maps, report = fit_lineas(
                    loaded.model,
                    chosen,
                    source_tokens,
                    target_tokens,
                    settings,
                    advance,
                    kept,
                    None if gates is None else gates.start(),
                )
            if gates is not None:
                gates = gates.after(loaded, maps)
                maps = gates.put_on(maps)
            figures = {
                "initial_loss": report.initial_loss,
                "final_loss": report.final_loss,
                **asdict(report.support),
                **({} if gates is None else gating.kept_by_gates(maps)),
                **({} if gates is None else gates.figures),
            }
            manifest = AffineManifest(
                **fields,
                kind="affine",
                method="lineas",
                base_model=BaseModelReference.model_validate(
                    loaded.description, from_attributes=True
                ),
                defaults=AffineDefaults(strength=strength),
                limits=AffineLimits(strength=limits),
                training={
                    "source": source_file.name,
                    "source_sha256": source_file.sha256,
                    "target": target_file.name,
                    "target_sha256": target_file.sha256,
                    "sites": pattern,
                    "max_tokens": max_tokens,
                    **asdict(settings),
                    **figures,
                    **({} if gates is None else gates.training),
                    **provenance(loaded),
                },
            )
            output.write(out, manifest, maps, figures, as_json)
