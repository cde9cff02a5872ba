"""`steerserve fit lin-act`, `mean-act` and `caa` fit affine maps in closed form."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Final

import typer

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
)
from server.cli.fit.two_sides import TwoSides
from steering.affine import AffineParameters
from steering.fit.baselines import BaselineSettings, ClosedForm, MappedSides, fit_baseline
from steering.fit.closed_forms import WHOLE_RANGE, check_support, linear_transport, mean_shift
from steering.sites import block_outputs, choose_sites, default_sites

_CAA_DEPTH: Final = 13 / 32  # the layer that the paper chose for Llama 2 7B, of its layers

_FamilySites = Annotated[str | None, chosen_sites("the model family's default sites")]
_OnePass = Annotated[
    int,
    typer.Option(
        min=1,
        help="Sentences in one forward pass, which bound the memory. If there are more, each site "
        "takes passes of its own over the sentences, so that the fit takes longer.",
    ),
]
_MappedSides = Annotated[
    MappedSides,
    typer.Option(
        help="Sentences whose activations are read with the maps of earlier sites active: the "
        "source's; both, as in the Lin-AcT authors' code; or none."
    ),
]


def lin_act(
    model: Model,
    source: Source,
    target: Target,
    out: Out,
    samples: AllOrSamples = None,
    quantiles: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="LOW HIGH",
            help="Quantiles of the source's activations, from 0 to 1, between which a coordinate "
            "is mapped.",
        ),
    ] = WHOLE_RANGE,
    support: Annotated[
        bool, typer.Option(help="Leave coordinates outside of --quantiles alone, or map all.")
    ] = True,
    mapped_sides: _MappedSides = "source",
    pooling: Pooling = "mean",
    batch_size: _OnePass = 256,
    sites: _FamilySites = None,
    strength: strengths.Strength = 1.0,
    max_strength: strengths.MaxStrength = 1.0,
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
    """Fit Lin-AcT maps: for each neuron, a line from SOURCE's sorted activations to TARGET's."""
    with output.user_errors_explained():
        fields = manifest_fields(out, name, description, license_)
        settings = BaselineSettings(pooling, mapped_sides, batch_size)
        limits = strengths.limits(strength, max_strength)
        check_support(quantiles)
        within = quantiles if support else None
        range_ = dict(zip(("low_quantile", "high_quantile"), quantiles, strict=True))
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
        pattern = sites or default_sites(sides.loaded.description.architecture)
        chosen = choose_sites(pattern, sides.loaded.description.site_widths)
        maps, figures = _fit(sides, chosen, partial(linear_transport, support=within), settings)
        training = {
            "sites": pattern,
            "support": support,
            **(range_ if support else {}),
            **asdict(settings),
            **figures,
        }
        manifest = sides.manifest(fields, "lin-act", strength, limits, training)
        output.write(out, manifest, maps, figures, as_json)


def mean_act(
    model: Model,
    source: Source,
    target: Target,
    out: Out,
    samples: AllOrSamples = None,
    mapped_sides: _MappedSides = "source",
    pooling: Pooling = "mean",
    batch_size: _OnePass = 256,
    sites: _FamilySites = None,
    strength: strengths.Strength = 1.0,
    max_strength: strengths.MaxStrength = 1.0,
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
    """Fit Mean-AcT maps, which shift SOURCE's mean activations to TARGET's, site after site."""
    with output.user_errors_explained():
        fields = manifest_fields(out, name, description, license_)
        settings = BaselineSettings(pooling, mapped_sides, batch_size)
        limits = strengths.limits(strength, max_strength)
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
        pattern = sites or default_sites(sides.loaded.description.architecture)
        chosen = choose_sites(pattern, sides.loaded.description.site_widths)
        maps, figures = _fit(sides, chosen, mean_shift, settings)
        training = {"sites": pattern, **asdict(settings), **figures}
        manifest = sides.manifest(fields, "mean", strength, limits, training)
        output.write(out, manifest, maps, figures, as_json)


def caa(
    model: Model,
    source: Source,
    target: Target,
    out: Out,
    samples: AllOrSamples = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Block whose output is shifted, the first is 0; if unset, the one at 13/32 of the "
            "depth, as for Llama 2 7B in the paper.",
        ),
    ] = None,
    pooling: Pooling = "last",
    batch_size: ForwardBatch = 32,
    sites: Annotated[str | None, chosen_sites("the output of --layer")] = None,
    strength: strengths.SignedStrength = 1.0,
    max_strength: strengths.SignedMaxStrength = 2.0,
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
    """Fit a CAA vector, the difference of TARGET's mean activations and SOURCE's at one layer."""
    with output.user_errors_explained():
        fields = manifest_fields(out, name, description, license_)
        settings = BaselineSettings(pooling, "none", batch_size)
        limits = strengths.limits(strength, max_strength, negative=True)
        if layer is not None and sites is not None:
            raise output.FitCommandError("give either --layer or --sites")
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
        known = sides.loaded.description.site_widths
        if sites is None:
            blocks = block_outputs(known, sides.loaded.description.num_layers)
            chosen: Sequence[str] = [_block(blocks, layer)]
        else:
            chosen = choose_sites(sites, known)
        maps, figures = _fit(sides, chosen, mean_shift, settings)
        training = {"sites": sites or chosen[0], **asdict(settings), **figures}
        manifest = sides.manifest(fields, "caa", strength, limits, training)
        output.write(out, manifest, maps, figures, as_json)


def _block(blocks: Sequence[str], layer: int | None) -> str:
    if layer is None:
        return blocks[min(round(_CAA_DEPTH * len(blocks)), len(blocks) - 1)]
    if layer >= len(blocks):
        raise output.FitCommandError(
            f"--layer {layer}: the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}"
        )
    return blocks[layer]


def _fit(
    sides: TwoSides, sites: Sequence[str], closed_form: ClosedForm, settings: BaselineSettings
) -> tuple[AffineParameters, Mapping[str, float]]:
    with output.progress("fitting maps") as advance:
        maps, report = fit_baseline(
            sides.loaded.model, sites, sides.source, sides.target, closed_form, settings, advance
        )
    return maps, asdict(report)
