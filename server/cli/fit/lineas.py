"""`steerserve fit lineas` fits affine maps to two files of sentences."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from interventions.manifest import (
    AffineDefaults,
    AffineLimits,
    AffineManifest,
    BaseModelReference,
)
from server.cli.fit import output
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
    Seed,
    Threads,
    default_setting,
)
from server.cli.fit.training_files import read_lines
from steering.fit.lineas import LineasSettings, OptimizerName, fit_lineas
from steering.sites import default_sites, locate_site, match_sites

_LIMITS: Final = AffineLimits()


def lineas(
    model: Model,
    source: Annotated[
        Path, typer.Option(help="File of sentences to steer away from, one per line.")
    ],
    target: Annotated[Path, typer.Option(help="File of sentences to steer towards, one per line.")],
    out: Out,
    samples: Annotated[int, typer.Option(min=1, help="Sentences drawn from each file.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = "sgd",
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the first step; it decays to 0.")
    ] = 0.1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sentences of each file in one optimizer step.")
    ] = 32,
    sites: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Regular expression for module paths; if unset, the model family's default sites.",
        ),
    ] = None,
    strength: Annotated[float, default_setting(_LIMITS.strength, "strength")] = 1.0,
    name: Name = None,
    description: Description = "",
    license_: License = "Apache-2.0",
    seed: Seed = 0,
    max_tokens: MaxTokens = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit LinEAS maps, which move the activations on SOURCE to the distribution on TARGET."""
    with output.user_errors_explained():
        fields = output.manifest_fields(out, name, description, license_)
        settings = LineasSettings(
            samples=samples,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate,
            seed=seed,
        )
        source_file, target_file = read_lines(source), read_lines(target)
        loaded = output.load(model, dtype, device, threads)
        pattern = sites or default_sites(loaded.description.architecture)
        known = loaded.description.site_widths
        outputs = [site for site in known if not locate_site(site).is_input]
        with output.progress("learning maps") as advance:
            maps, report = fit_lineas(
                loaded.model,
                match_sites(pattern, outputs),
                [output.tokenize(loaded, line, max_tokens) for line in source_file.lines],
                [output.tokenize(loaded, line, max_tokens) for line in target_file.lines],
                settings,
                advance,
            )
        manifest = AffineManifest(
            **fields,
            kind="affine",
            method="lineas",
            base_model=BaseModelReference.model_validate(loaded.description, from_attributes=True),
            defaults=AffineDefaults(strength=strength),
            training={
                "source": source_file.name,
                "source_sha256": source_file.sha256,
                "target": target_file.name,
                "target_sha256": target_file.sha256,
                "sites": pattern,
                "max_tokens": max_tokens,
                **asdict(settings),
                **asdict(report),
                **output.provenance(loaded),
            },
        )
        output.write(out, manifest, maps, asdict(report), as_json)
