"""Fits the papers' affine baselines in closed form: Lin-AcT, Mean-AcT and CAA.

Lin-AcT and Mean-AcT: Rodriguez et al., "Controlling Language and Diffusion Models by Transporting
Activations", ICLR 2025 (arXiv 2410.23054). For each neuron of a site, x are the pooled activations
of the source sentences and y those of the target sentences, both sorted:

    Lin-AcT     w, b = argmin sum_i (w x_i + b - y_i)^2,  for z between two quantiles of x only
    Mean-AcT    w = 1, b = mean(y) - mean(x)

Sites are fitted one after the other, in the order in which the model runs them, and the source's
activations at a site are read with the maps of all earlier sites active. The authors' code also
leaves alone a z that equals one of the quantiles; here the support is the paper's closed interval.

CAA: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024 (arXiv
2312.06681): w = 1, b = mean(target) - mean(source), all sites read from the untouched model. (The
paper averages differences over pairs, which gives the same vector if all pairs are used.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.activations import (
    TokenIds,
    collect_token_means,
    frozen,
    model_device,
    pad_right,
    run_sites,
    site_token_means,
)
from steering.fit.closed_forms import couple
from steering.fit.pooling import Pooling, pool_tokens

ClosedForm: TypeAlias = Callable[[Tensor, Tensor], AffineMap]
"""Makes the map from (n, d) to (m, d) float32, the pooled activations of source and target."""
MappedSides: TypeAlias = Literal["source", "both", "none"]


@dataclass(frozen=True, slots=True)
class BaselineSettings:
    """How activations are read. The defaults are Lin-AcT's and Mean-AcT's."""

    pooling: Pooling = "mean"
    # The sentences that are read with the maps of earlier sites active. The Lin-AcT authors' code
    # reads both sides so; CAA reads neither.
    mapped_sides: MappedSides = "source"
    # Sentences in a forward pass. If all mapped sentences fit in one, it fits all sites; if not,
    # each site needs a pass of its own over the sentences.
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range.
        """
        if self.batch_size < 1:
            raise FitError("batch_size must be at least 1")
        if self.pooling not in get_args(Pooling):
            raise FitError(f"pooling must be one of {', '.join(get_args(Pooling))}")
        if self.mapped_sides not in get_args(MappedSides):
            raise FitError(f"mapped_sides must be one of {', '.join(get_args(MappedSides))}")


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """The distance of the source's activations from the target's, without maps and with all.

    It is the squared Wasserstein distance of one neuron's two distributions, averaged over neurons
    and then over sites.
    """

    initial_distance: float
    final_distance: float


def fit_baseline(
    model: nn.Module,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    target: Sequence[TokenIds],
    closed_form: ClosedForm,
    settings: BaselineSettings,
    on_site: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, AffineMap], BaselineReport]:
    """Fit a map to each site.

    Args:
        model: a causal language model; not changed.
        sites: outputs and inputs of modules.
        source: token ids of sentences to steer away from.
        target: token ids of sentences to steer towards; they need not be pairs, nor as many.
        closed_form: `linear_transport` or `mean_shift`.
        settings: the fit's settings.
        on_site: called after each site with (sites done, sites in all).

    Returns:
        site -> its map, float32 on the model's device, in the order in which the model runs them;
        and the report.

    Raises:
        FitError: no sentence on a side, or too few, an empty one, a site that the model lacks, or
            activations that are not finite.
    """
    with frozen(model):
        read = partial(_read, model, settings)
        untouched = read(sites, source, {})
        targets = read(sites, target, {})
        mapped = _mapped_sentences(source, target, settings.mapped_sides)
        if 0 < len(mapped) <= settings.batch_size:
            maps = _fit_in_one_pass(
                model, sites, mapped, len(source), targets, closed_form, settings.pooling, on_site
            )
        else:
            maps = {}
            for done, site in enumerate(_running_order(model, sites, source[0]), start=1):
                x, y = untouched[site], targets[site]
                if maps and settings.mapped_sides != "none":
                    x = read([*maps, site], source, maps)[site]
                if maps and settings.mapped_sides == "both":
                    y = read([*maps, site], target, maps)[site]
                maps[site] = closed_form(x, y)
                if on_site is not None:
                    on_site(done, len(sites))
        report = BaselineReport(
            initial_distance=_mean_distance(untouched, targets),
            final_distance=_mean_distance(read(sites, source, maps), targets),
        )
    return maps, report


def _mapped_sentences(
    source: Sequence[TokenIds], target: Sequence[TokenIds], sides: MappedSides
) -> list[TokenIds]:
    """Return the sentences that are read through the maps of earlier sites."""
    if sides == "none":
        return []
    return [*source, *(target if sides == "both" else ())]


@torch.no_grad()
def _fit_in_one_pass(
    model: nn.Module,
    sites: Sequence[str],
    mapped: Sequence[TokenIds],
    sources: int,
    targets: Mapping[str, Tensor],
    closed_form: ClosedForm,
    pooling: Pooling,
    on_site: Callable[[int, int], None] | None,
) -> dict[str, AffineMap]:
    """Fit each map when the pass reaches its site, and go on with the mapped activations.

    Args:
        model: a causal language model.
        sites: outputs and inputs of modules.
        mapped: the source sentences, and behind them the target's if they are mapped too.
        sources: number of source sentences.
        targets: the untouched target's pooled activations by site.
        closed_form: see `fit_baseline`.
        pooling: how a sentence's tokens become one vector.
        on_site: see `fit_baseline`.
    """
    maps: dict[str, AffineMap] = {}
    batch = pad_right(mapped, model_device(model))

    def fit_and_map(site: str, z: Tensor) -> Tensor:
        pooled = pool_tokens(z, batch.attention_mask, pooling)
        y = pooled[sources:] if len(mapped) > sources else targets[site]
        maps[site] = closed_form(pooled[:sources], y)
        if on_site is not None:
            on_site(len(maps), len(sites))
        return _apply(maps[site], z.float()).to(z.dtype)

    run_sites(model, batch, sites, fit_and_map)
    return maps


def _read(
    model: nn.Module,
    settings: BaselineSettings,
    sites: Sequence[str],
    sequences: Sequence[TokenIds],
    maps: Mapping[str, AffineMap],
) -> dict[str, Tensor]:
    edits = {site: partial(_apply, map_) for site, map_ in maps.items()}
    return collect_token_means(
        model, sites, sequences, settings.batch_size, settings.pooling, edits
    )


def _apply(map_: AffineMap, z: Tensor) -> Tensor:
    """Return z, (..., d) float32, as the map is served at strength 1."""
    edited = torch.addcmul(map_.bias, map_.weight, z)
    if map_.low is None or map_.high is None:
        return edited
    return torch.where((z >= map_.low) & (z <= map_.high), edited, z)


def _running_order(model: nn.Module, sites: Sequence[str], sequence: TokenIds) -> list[str]:
    """Return the sites in the order in which the model runs them, which paths need not tell."""
    return list(site_token_means(model, sites, pad_right([sequence], model_device(model))))


def _mean_distance(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> float:
    distances = []
    for site, states in source.items():
        x, y, shares = couple(states, target[site])
        distances.append((shares * (x - y).square()).sum(0).mean())
    return torch.stack(distances).mean().item()
