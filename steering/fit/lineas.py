"""Fits LinEAS maps end to end, by a distributional loss over all sites at once.

Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
NeurIPS 2025 (arXiv 2503.10679), algorithm 1. At site l, of width d_l, `xi_l` are the pooled
activations (token means, in the paper) of n source sentences with *all maps active*, and `eta_l`
those of n target sentences in the untouched model. The loss is

    C = 1/L sum_l 1/d_l sum_j || sort(xi_l[:, j]) - sort(eta_l[:, j]) ||^2

i.e. for each neuron n times the squared 1-D Wasserstein distance between the two batches. Maps
start at the identity (w = 1, b = 0) and are optimised by SGD, Adam or AdamW with a cosine schedule.
A proximal step after each of the optimizer's makes them sparse, if `gamma` is not 0
(`steering.fit.sparsity`). Gates may be learnt with the maps (`steering.fit.gate_training`).

Memory is bounded by one forward and backward pass of `micro_batch` sentences through the model, up
to the last site; their longest sentence decides. What grows with the number of sentences is one
vector for each target sentence and site, and in a step one for each of the batch and site.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from steering.affine import AffineMap
from steering.fit import FitError, OnStep
from steering.fit.activations import TokenIds, frozen
from steering.fit.gate_training import GateTraining
from steering.fit.lineas_settings import LineasSettings
from steering.fit.lineas_training import LineasTraining, State
from steering.fit.sampling import draw
from steering.fit.sparsity import Support, acts, support_of


@dataclass(frozen=True, slots=True)
class LineasReport:
    """The losses before the first step and after the last, and what the maps act on.

    The losses are those of all drawn sentences, in the scale of a step's loss, which is a sum over
    the sentences of a batch: losses compare only at equal batch sizes.
    """

    initial_loss: float
    final_loss: float
    support: Support


class Checkpoint(Protocol):
    """Keeps the state of a fit, so that another run can go on from it."""

    def load(self) -> State | None:
        """Return the last state that was saved; None if there is none."""

    def save(self, step: int, state: State) -> None:
        """Save the state after a step, counted from 1; called after each one."""


def fit_lineas(
    model: nn.Module,
    sites: Sequence[str],
    source: Sequence[TokenIds],
    target: Sequence[TokenIds],
    settings: LineasSettings,
    on_step: OnStep | None = None,
    checkpoint: Checkpoint | None = None,
    gating: GateTraining | None = None,
) -> tuple[dict[str, AffineMap], LineasReport]:
    """Learn maps from source activations (e.g. toxic) to the distribution of the target's.

    The same inputs and seed give the same maps on the same machine and number of threads, also if
    the fit is interrupted and goes on from a checkpoint.

    Args:
        model: a causal language model; not changed.
        sites: outputs and inputs of modules (see `steering.sites`), which are mapped.
        source: token ids of at least `settings.samples` sentences.
        target: likewise, `settings.target_samples`; the two sides need not be pairs.
        settings: the fit's settings.
        on_step: called after every step.
        checkpoint: where the fit goes on from, if it holds a state of it, and saves its states.
        gating: gates of these sites, which are learnt with the maps; None for maps without gates.

    Returns:
        site -> its map, float32 on the model's device, without sites whose map is the identity;
        and the report.

    Raises:
        FitError: too few sentences, an empty one, a site that the model lacks, a checkpoint of
            another fit, activations or a loss that are not finite, a loss that rose, or no map that
            does anything.
    """
    random = torch.Generator().manual_seed(settings.seed)
    chosen_source = draw(source, settings.samples, random, "source", "samples")
    chosen_target = draw(
        target,
        settings.target_count,
        random,
        "target",
        "samples" if settings.target_samples is None else "target_samples",
    )
    with frozen(model):
        training = LineasTraining(
            model, sites, chosen_source, chosen_target, settings, random, gating
        )
        if not math.isfinite(training.initial_loss):
            raise FitError(
                "activations are not finite: use a wider --dtype, or leave their sites out"
            )
        if checkpoint is not None and (state := checkpoint.load()) is not None:
            training.restore(state)
        while training.steps_done < settings.steps:
            loss = training.step()
            if checkpoint is not None:
                checkpoint.save(training.steps_done, training.state())
            if on_step is not None:
                on_step(training.steps_done, settings.steps, loss)
        final_loss = training.loss_over_all()
    if not final_loss <= training.initial_loss:
        raise FitError(
            f"the loss rose from {training.initial_loss:.4g} to {final_loss:.4g}: lower the "
            "learning rate"
        )
    report = LineasReport(training.initial_loss, final_loss, support_of(training.maps))
    return _acting(training.maps, settings), report


def _acting(maps: Mapping[str, AffineMap], settings: LineasSettings) -> dict[str, AffineMap]:
    """Return the maps that are not the identity."""
    acting = {site: map_ for site, map_ in maps.items() if bool(acts(map_).any())}
    if not acting and settings.gamma > 0:
        raise FitError(f"sparsity took every map away: lower gamma, which is {settings.gamma:g}")
    if not acting:
        raise FitError("every map is still the identity: the source and the target do not differ")
    return acting
