"""Fits ITI: shifts the outputs of the attention heads that best tell two sets of sentences apart.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS
2023 (arXiv 2306.03341). A site is the input of an attention block's output projection: the outputs
of the block's heads, side by side. A logistic probe for each head tells its outputs at the last
token of target sentences from those of source sentences. The heads whose probes are right most
often on held-out sentences are shifted, each by

    h <- h + strength * sigma * theta

where theta is a unit vector towards the target, and sigma the standard deviation of the head's
outputs along theta, over the sentences of both sides. Theta is the probe's normal (`probe`: the
paper's "probe weight direction", ITI-c in the papers on activation transport) or the difference of
the means (`mean`: "mass mean shift").
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from steering.affine import AffineMap
from steering.fit import FitError
from steering.fit.logistic import fit_logistic

DirectionName: TypeAlias = Literal["probe", "mean"]


@dataclass(frozen=True, slots=True)
class ItiSettings:
    """Settings of a fit. The defaults are the authors'."""

    heads: int = 48  # shifted; all if the model has fewer
    direction: DirectionName = "probe"
    held_out: float = 0.2  # share of each side's sentences that the probes do not see
    seed: int = 0  # of the choice of held-out sentences

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range.
        """
        if self.heads < 1:
            raise FitError("heads must be at least 1")
        if not 0 < self.held_out < 1:
            raise FitError("held_out must lie between 0 and 1")
        if self.seed < 0:
            raise FitError("seed must not be negative")
        if self.direction not in get_args(DirectionName):
            raise FitError(f"direction must be one of {', '.join(get_args(DirectionName))}")


@dataclass(frozen=True, slots=True)
class ItiReport:
    """The shifted heads, and how often their probes are right on held-out sentences (0 to 1)."""

    shifted_heads: int
    all_heads: int
    best_accuracy: float
    mean_accuracy: float  # of the shifted heads
    worst_accuracy: float  # of the shifted heads


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One side's outputs of a site's heads: (heads, sentences, width of a head) float64."""

    training: Tensor
    held_out: Tensor

    @property
    def every(self) -> Tensor:
        return torch.cat([self.training, self.held_out], dim=1)


def fit_iti(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    heads_per_site: int,
    settings: ItiSettings,
    on_site: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, AffineMap], ItiReport]:
    """Fit probes to all heads, and return the shifts of the best.

    Args:
        source: site -> (n, d) float32, the outputs of its heads for n sentences to steer away from.
        target: the same sites -> (m, d) float32, for m sentences to steer towards.
        heads_per_site: number of heads side by side in d.
        settings: the fit's settings.
        on_site: called after each site with (sites done, sites in all).

    Returns:
        site -> its map, whose weights are 1 and whose bias is sigma * theta in the coordinates of
        shifted heads and 0 elsewhere; only sites with a shifted head. And the report.

    Raises:
        FitError: fewer than 2 sentences on a side, a width that is not a multiple of
            `heads_per_site`, or no head that tells the sides apart.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    source_rows = _split(_count(source, "source"), settings.held_out, generator)
    target_rows = _split(_count(target, "target"), settings.held_out, generator)
    shifts, accuracies, losses = [], [], []
    for done, site in enumerate(source, start=1):
        away = _by_head(site, source[site], heads_per_site, source_rows)
        towards = _by_head(site, target[site], heads_per_site, target_rows)
        probes = fit_logistic(away.training, towards.training)
        accuracies.append(probes.accuracies(away.held_out, towards.held_out))
        losses.append(probes.log_losses(away.held_out, towards.held_out))
        direction = probes.weights
        if settings.direction == "mean":
            direction = towards.every.mean(1) - away.every.mean(1)
        shifts.append(_shifts(direction, torch.cat([away.every, towards.every], dim=1)))
        if on_site is not None:
            on_site(done, len(source))
    chosen = _best(torch.cat(accuracies), torch.cat(losses), torch.cat(shifts), settings.heads)
    maps = {}
    by_site = chosen.view(-1, heads_per_site)
    for site, shift, kept in zip(source, shifts, by_site, strict=True):
        if kept.any():
            bias = torch.where(kept[:, None], shift, 0).flatten().float()
            maps[site] = AffineMap(weight=torch.ones_like(bias), bias=bias)
    scores = torch.cat(accuracies)[chosen]
    report = ItiReport(
        shifted_heads=len(scores),
        all_heads=len(chosen),
        best_accuracy=scores.max().item(),
        mean_accuracy=scores.mean().item(),
        worst_accuracy=scores.min().item(),
    )
    return maps, report


def _shifts(directions: Tensor, states: Tensor) -> Tensor:
    """Return sigma * theta for each head, 0 where the direction is 0: (heads, width)."""
    units = functional.normalize(directions, dim=1)
    along = (states @ units[:, :, None]).squeeze(-1)
    return along.std(dim=1, correction=0)[:, None] * units


def _best(accuracies: Tensor, losses: Tensor, shifts: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` most accurate heads; of equals, those with lower losses.

    Few held-out sentences give many equal accuracies.
    """
    useful = shifts.ne(0).any(dim=1)
    if not useful.any():
        raise FitError(
            "no attention head tells the source from the target: are the two files different?"
        )
    by_loss = losses.argsort(stable=True)
    order = by_loss[accuracies[by_loss].argsort(stable=True, descending=True)]
    chosen = torch.zeros_like(useful)
    chosen[order[useful[order]][:count]] = True
    return chosen


def _count(states: Mapping[str, Tensor], side: str) -> int:
    if not states:
        raise FitError("there is no site to fit")
    count = len(next(iter(states.values())))
    if count < 2:
        raise FitError(
            f"ITI needs at least 2 sentences in the {side}, one to learn from and one to hold out; "
            f"it has {count}"
        )
    return count


def _split(count: int, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows of sentences to learn from and to hold out, at least one each."""
    rows = torch.randperm(count, generator=generator)
    held = min(max(math.floor(count * held_out), 1), count - 1)
    return rows[held:], rows[:held]


def _by_head(site: str, states: Tensor, heads: int, rows: tuple[Tensor, Tensor]) -> _Side:
    if states.shape[1] % heads:
        raise FitError(
            f"{site} is {states.shape[1]} wide, which is no multiple of the model's {heads} "
            "attention heads: choose inputs of attention output projections"
        )
    split = states.double().view(len(states), heads, -1).transpose(0, 1)
    training, held_out = (each.to(states.device) for each in rows)
    return _Side(training=split[:, training], held_out=split[:, held_out])
