"""Fits LinEAS maps end to end, by a distributional loss over all sites at once.

Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
NeurIPS 2025 (arXiv 2503.10679), algorithm 1 without its optional sparsity step. At site l, of width
d_l, `xi_l` are the token-mean activations of n source sentences with *all maps active*, and `eta_l`
those of n target sentences in the untouched model. The loss is

    C = 1/L sum_l 1/d_l sum_j || sort(xi_l[:, j]) - sort(eta_l[:, j]) ||^2

i.e. for each neuron n times the squared 1-D Wasserstein distance between the two batches. Maps
start at the identity (w = 1, b = 0) and are optimised by SGD or Adam with a cosine schedule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from steering.affine import AffineMap
from steering.fit import FitError, OnStep
from steering.fit.activations import (
    TokenIds,
    collect_token_means,
    frozen,
    model_device,
    pad_right,
    site_token_means,
)

OptimizerName: TypeAlias = Literal["sgd", "adam"]


@dataclass(frozen=True, slots=True)
class LineasSettings:
    """Settings of a fit. The defaults are the paper's sizes, and a learning rate that suits SGD."""

    samples: int = 32  # sentences drawn from each side
    steps: int = 1000
    batch_size: int = 32  # sentences of each side in a step; at most `samples` are used
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.1  # at the first step; a cosine takes it to 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range.
        """
        if min(self.samples, self.steps, self.batch_size) < 1:
            raise FitError("samples, steps and batch_size must be at least 1")
        if self.seed < 0:
            raise FitError("seed must not be negative")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise FitError("learning_rate must be a positive number")
        if self.optimizer not in get_args(OptimizerName):
            raise FitError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}")


@dataclass(frozen=True, slots=True)
class LineasReport:
    """The loss over all drawn sentences, before the first step and after the last.

    The loss of a batch is a sum over its sentences, so losses compare only at equal batch sizes.
    """

    initial_loss: float
    final_loss: float


def distributional_loss(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Return the loss C of the module's docstring.

    Args:
        source: site -> (n, d) float32.
        target: the same sites, with the same shapes.

    Returns:
        () float32, in squared units of the activations.
    """
    per_site = [
        (source[site].sort(dim=0).values - target[site].sort(dim=0).values).square().sum(0).mean()
        for site in target
    ]
    return torch.stack(per_site).mean()


def fit_lineas(
    model: nn.Module,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    target: Sequence[TokenIds],
    settings: LineasSettings,
    on_step: OnStep | None = None,
) -> tuple[dict[str, AffineMap], LineasReport]:
    """Learn maps from source activations (e.g. toxic) to the distribution of the target's.

    The same inputs and seed give the same maps on the same machine and number of threads.

    Args:
        model: a causal language model; not changed.
        sites: module paths whose outputs are mapped.
        source: token ids of at least `settings.samples` sentences.
        target: likewise; the two sides need not be pairs.
        settings: the fit's settings.
        on_step: called after every step.

    Returns:
        site -> its map, float32 on the model's device; and the report.

    Raises:
        FitError: too few sentences, an empty one, a site that the model lacks, or a loss that
            rose.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    chosen_source = _draw(source, settings.samples, generator, "source")
    chosen_target = _draw(target, settings.samples, generator, "target")
    with frozen(model):
        fit = _Fit(model, sites, chosen_source, chosen_target, settings.batch_size)
        initial_loss = fit.loss_over_all()
        _descend(fit, settings, generator, on_step)
        report = LineasReport(initial_loss=initial_loss, final_loss=fit.loss_over_all())
    if not report.final_loss <= initial_loss:
        raise FitError(
            f"the loss rose from {initial_loss:.4g} to {report.final_loss:.4g}: lower the learning "
            "rate"
        )
    maps = {
        site: AffineMap(weight=map_.weight.detach(), bias=map_.bias.detach())
        for site, map_ in fit.maps.items()
    }
    return maps, report


class _Fit:
    """The maps being learnt, with the sentences that they are learnt from."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        source: Sequence[TokenIds],
        target: Sequence[TokenIds],
        batch_size: int,
    ) -> None:
        self._model = model
        self._source = source
        self._target_means = collect_token_means(model, sites, target, batch_size)
        self.batch_size = min(batch_size, len(source))
        self.maps = {
            site: AffineMap(
                weight=torch.ones_like(means[0]).requires_grad_(),
                bias=torch.zeros_like(means[0]).requires_grad_(),
            )
            for site, means in self._target_means.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for map_ in self.maps.values() for tensor in (map_.weight, map_.bias)]

    def loss(self, source_rows: Tensor, target_rows: Tensor) -> Tensor:
        """Return the loss of one batch, from equally many rows of source and target."""
        batch = pad_right(
            [self._source[row] for row in source_rows.tolist()], model_device(self._model)
        )
        edits = {
            site: partial(torch.addcmul, map_.bias, map_.weight) for site, map_ in self.maps.items()
        }
        means = site_token_means(self._model, list(self.maps), batch, edits)
        target = {site: every[target_rows] for site, every in self._target_means.items()}
        return distributional_loss(means, target)

    @torch.no_grad()
    def loss_over_all(self) -> float:
        """Return the mean loss over all full batches of the sentences, in a fixed order."""
        full = len(self._source) // self.batch_size
        batches = torch.arange(full * self.batch_size).view(full, self.batch_size)
        return float(torch.stack([self.loss(rows, rows) for rows in batches]).mean())


def _draw(
    sentences: Sequence[TokenIds], samples: int, generator: torch.Generator, side: str
) -> list[TokenIds]:
    if len(sentences) < samples:
        raise FitError(f"{samples} samples were asked for, the {side} has {len(sentences)}")
    rows = torch.randperm(len(sentences), generator=generator)[:samples]
    return [sentences[row] for row in rows.tolist()]


def _optimizer(settings: LineasSettings, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.Adam(parameters, lr=settings.learning_rate)


def _descend(
    fit: _Fit, settings: LineasSettings, generator: torch.Generator, on_step: OnStep | None
) -> None:
    optimizer = _optimizer(settings, fit.parameters)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    for step in range(1, settings.steps + 1):
        # Source and target are drawn independently: the loss compares distributions, not pairs.
        source_rows = torch.randperm(settings.samples, generator=generator)[: fit.batch_size]
        target_rows = torch.randperm(settings.samples, generator=generator)[: fit.batch_size]
        optimizer.zero_grad()
        loss = fit.loss(source_rows, target_rows)
        if not math.isfinite(loss.item()):
            raise FitError(f"the loss is not finite at step {step}: lower the learning rate")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, settings.steps, loss.item())
