"""Trains ARGRE's reward head on preference pairs, and keeps the best epoch's head.

AdamW with a linear warm-up and a cosine decay, and an evaluation on held-out pairs after each
epoch, as in the authors' code (github.com/xiaoyisong/ARGRE). `steering.fit.preferences` defines the
loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steering.fit import FitError, OnStep
from steering.fit.argre_settings import ArgreSettings
from steering.fit.preferences import (
    Preferences,
    common_tokens,
    pair_loss,
    path_rewards,
    preference_loss,
    shortfall,
)
from steering.reward import RewardHead, reward


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measures of a head on pairs, over all tokens of each text."""

    accuracy: float  # share of pairs whose positive has the larger sum of rewards
    loss: float  # mean of `preferences.pair_loss`

    def is_better_than(self, other: "Evaluation") -> bool:
        """Return True for a higher accuracy, or for an equal one and a lower loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass(frozen=True, slots=True, eq=False)
class TrainedHead:
    """The best epoch's head, and the measures of its training."""

    head: RewardHead  # without gradients
    epoch: int  # the head's, counted from 1
    held_out: Evaluation | None  # of the head; None if no pairs are held out
    epoch_losses: tuple[float, ...]  # mean training loss of every epoch


def initial_head(direction: Tensor, hidden_units: int, generator: torch.Generator) -> RewardHead:
    """Return a head of two linear layers, initialised as torch does, but from `generator`.

    Args:
        direction: (width,) float32, kept as it is.
        hidden_units: the first layer's outputs.
        generator: a generator on the CPU, so that all devices begin with the same head.

    Returns:
        The head, on the direction's device, with gradients in both layers, and a positive reward
        of 0.
    """

    def uniform(fan_in: int, *shape: int) -> Tensor:
        bound = 1 / math.sqrt(fan_in)
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return values.to(direction.device).requires_grad_()

    width = len(direction)
    return RewardHead(
        w1=uniform(width, hidden_units, width),
        b1=uniform(width, hidden_units),
        w2=uniform(hidden_units, hidden_units),
        b2=uniform(hidden_units),
        direction=direction,
        positive_reward=torch.zeros((), device=direction.device),
    )


def train_reward(
    head: RewardHead,
    training: Preferences,
    held_out: Preferences,
    settings: ArgreSettings,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> TrainedHead:
    """Optimise the head in place, and return the best epoch's.

    The best epoch has the highest accuracy on the held-out pairs; of several the lowest loss on
    them; of several the first. Without held-out pairs the last epoch's head is returned.

    Beside the head and its optimiser's state, memory holds one step's hidden states at a time:
    those of `batch_size` pairs, and the head's units for them at `interpolations + 2` points.

    Args:
        head: from `initial_head`.
        training: the pairs to learn from; at least one.
        held_out: the pairs that select the epoch; may be empty.
        settings: the fit's settings.
        generator: shuffles the pairs.
        on_step: called after every step.

    Raises:
        FitError: the loss is no longer finite.
    """
    steps = math.ceil(len(training) / settings.batch_size)
    learner = _Learner(head, settings, steps * settings.epochs)
    kept: tuple[RewardHead, int, Evaluation | None] | None = None
    epoch_losses = []
    for epoch in range(settings.epochs):
        losses: list[float] = []
        order = torch.randperm(len(training), generator=generator)
        for rows in torch.split(order, min(settings.batch_size, len(order))):
            losses.append(learner.step(training, rows.tolist()))
            if on_step is not None:
                on_step(epoch * steps + len(losses), steps * settings.epochs, losses[-1])
        epoch_losses.append(sum(losses) / len(losses))
        measured = evaluate(head, held_out, settings)
        best = None if kept is None else kept[2]
        if measured is None or best is None or measured.is_better_than(best):
            kept = (_without_gradients(head), epoch + 1, measured)
    assert kept is not None  # settings have at least one epoch
    return TrainedHead(*kept, tuple(epoch_losses))


class _Learner:
    """Takes optimizer steps on a head."""

    def __init__(self, head: RewardHead, settings: ArgreSettings, steps: int) -> None:
        self._head = head
        self._settings = settings
        self._unit = head.direction / head.direction.norm()
        self._optimizer = torch.optim.AdamW(
            [head.w1, head.b1, head.w2, head.b2],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        warmup = min(settings.warmup_steps, steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, warmup_then_cosine(warmup, steps)
        )

    def step(self, training: Preferences, rows: Sequence[int]) -> float:
        """Take one step on the paths of some of the pairs, and return its loss."""
        settings = self._settings
        positive, negative, mask = common_tokens([training[row] for row in rows])
        rewards = path_rewards(self._head, positive, negative, self._unit, settings.interpolations)
        loss = preference_loss(rewards, mask, settings.beta, settings.center)
        if training.neutral_rows and settings.neutral_weight > 0:
            neutral = torch.tensor([training.is_neutral(row) for row in rows], device=mask.device)
            loss = loss + settings.neutral_weight * shortfall(rewards[0], mask, neutral)
        value = _finite(loss.item())
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return value


@torch.no_grad()
def evaluate(
    head: RewardHead, preferences: Preferences, settings: ArgreSettings
) -> Evaluation | None:
    """Measure a head on pairs' own hidden states, without a path; return None if there are none.

    Raises:
        FitError: the loss is not finite.
    """
    right, losses = 0, []
    for index in range(len(preferences)):
        positive, negative = (reward(head, states) for states in preferences[index])
        right += int(positive.sum() > negative.sum())
        losses.append(pair_loss(positive, negative, settings.beta, settings.center).item())
    if not losses:
        return None
    return Evaluation(right / len(losses), _finite(sum(losses) / len(losses)))


def warmup_then_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Return the learning rate's factor of a step, counted from 0: up to 1, then down to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def _without_gradients(head: RewardHead) -> RewardHead:
    """Return a copy, which later steps do not change."""
    layers = {name: getattr(head, name).detach().clone() for name in ("w1", "b1", "w2", "b2")}
    return replace(head, **layers)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise FitError("the loss is no longer finite: lower the learning rate")
    return loss
