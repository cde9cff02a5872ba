"""`steerserve fit iti` fits shifts of single attention heads' outputs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Final

import typer
from torch import Tensor

from server.cli.fit import output, strengths
from server.cli.fit.manifest_fields import manifest_fields
from server.cli.fit.options import (
    AllOrSamples,
    AsJson,
    Description,
    Device,
    Dtype,
    ForwardBatch,
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
    default_setting,
)
from server.cli.fit.two_sides import TwoSides
from server.engine.torch.model.loader import LoadedModel
from steering.fit.activations import TokenIds, collect_token_means
from steering.fit.iti import DirectionName, ItiSettings, fit_iti
from steering.fit.pooling import Pooling as PoolingName
from steering.sites import HEAD_OUTPUTS, choose_sites, locate_site

_DEFAULTS: Final = ItiSettings()


def iti(
    model: Model,
    source: Source,
    target: Target,
    out: Out,
    samples: AllOrSamples = None,
    heads: Annotated[
        int, typer.Option(min=1, help="Attention heads to shift; all if the model has fewer.")
    ] = _DEFAULTS.heads,
    direction: Annotated[
        DirectionName,
        typer.Option(help="Shift along the normal of a head's probe, or between the means."),
    ] = _DEFAULTS.direction,
    held_out: Annotated[
        float, typer.Option(help="Share of the sentences that judge the probes, from 0 to 1.")
    ] = _DEFAULTS.held_out,
    pooling: Pooling = "last",
    batch_size: ForwardBatch = 32,
    sites: Annotated[
        str | None, chosen_sites("the inputs of all attention blocks' output projections")
    ] = None,
    strength: Annotated[
        float,
        default_setting(strengths.SERVABLE, "strength, in standard deviations of a head's outputs"),
    ] = 15.0,
    max_strength: strengths.SignedMaxStrength = 30.0,
    name: Name = None,
    description: Description = "",
    license_: License = "Apache-2.0",
    seed: Seed = 0,
    max_tokens: MaxTokens = 128,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit ITI: shift the attention heads that best tell SOURCE from TARGET."""
    with output.user_errors_explained():
        fields = manifest_fields(out, name, description, license_)
        settings = ItiSettings(heads, direction, held_out, seed)
        limits = strengths.limits(strength, max_strength, negative=True)
        sides = TwoSides.read(
            source=source,
            target=target,
            samples=samples,
            seed=seed,
            max_tokens=max_tokens,
            model=model,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        loaded, pattern = sides.loaded, sites or HEAD_OUTPUTS
        chosen = choose_sites(pattern, loaded.description.site_widths)
        if outputs := [site for site in chosen if not locate_site(site).is_input]:
            raise output.FitCommandError(
                f"--sites {pattern!r} chooses {outputs[0]}, an output: ITI needs the inputs of "
                "attention output projections"
            )
        read = [
            _read(loaded, chosen, sentences, side, batch_size, pooling)
            for side, sentences in (("source", sides.source), ("target", sides.target))
        ]
        with output.progress("fitting probes") as advance:
            maps, report = fit_iti(read[0], read[1], _attention_heads(loaded), settings, advance)
        figures = asdict(report)
        training = {
            "sites": pattern,
            "pooling": pooling,
            "batch_size": batch_size,
            **asdict(settings),
            **figures,
        }
        manifest = sides.manifest(fields, "iti", strength, limits, training)
        output.write(out, manifest, maps, figures, as_json)


def _attention_heads(loaded: LoadedModel) -> int:
    heads: int = loaded.model.config.get_text_config().num_attention_heads
    return heads


def _read(
    loaded: LoadedModel,
    sites: Sequence[str],
    sentences: Sequence[TokenIds],
    side: str,
    batch_size: int,
    pooling: PoolingName,
) -> dict[str, Tensor]:
    """Return the pooled outputs of heads: site -> (sentences, width) float32."""
    with output.progress(f"reading attention heads, {side}") as advance:
        return collect_token_means(
            loaded.model, sites, sentences, batch_size, pooling, on_batch=advance
        )
