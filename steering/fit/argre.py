"""Fits ARGRE's direction and reward head on hidden states of preference pairs.

`steering.fit.preferences` defines the direction and the loss. The head is optimised by AdamW with
a warm-up and a cosine schedule, as in the authors' code (github.com/xiaoyisong/ARGRE). Their code
adds the first principal component, a unit vector, to the direction. The paper does not, nor does
this module.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.fit import FitError, OnStep
from steering.fit.preferences import common_tokens, interpolate, mean_direction, preference_loss
from steering.reward import RewardHead, reward


@dataclass(frozen=True, slots=True)
class ArgreSettings:
    """Settings of a fit. The defaults are the authors'."""

    hidden_units: int = 1024  # m, of the head
    interpolations: int = 7  # points between the two ends of a pair's path
    beta: float = 0.05  # scale of the preference in the loss
    center: float = 0.01  # weight of the loss term that keeps rewards around 0
    epochs: int = 3
    batch_size: int = 4  # pairs in a step
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 100  # at most a tenth of all steps
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            FitError: a setting is out of its range.
        """
        if min(self.hidden_units, self.epochs, self.batch_size) < 1:
            raise FitError("hidden_units, epochs and batch_size must be at least 1")
        if min(self.interpolations, self.warmup_steps, self.seed) < 0:
            raise FitError("interpolations, warmup_steps and seed must not be negative")
        rates = (self.beta, self.learning_rate)
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise FitError("beta and learning_rate must be positive numbers")
        if not (self.center >= 0 and self.weight_decay >= 0):
            raise FitError("center and weight_decay must not be negative")


@dataclass(frozen=True, slots=True)
class ArgreReport:
    """The mean losses of a fit's first and last epoch, and the fitted head's rewards."""

    initial_loss: float
    final_loss: float
    accuracy: float  # share of pairs whose positive has the larger mean reward over its tokens
    positive_reward: float  # mean over all positives' tokens
    negative_reward: float  # mean over all negatives' tokens
    direction_norm: float


def fit_argre(
    positives: Sequence[Tensor],
    negatives: Sequence[Tensor],
    settings: ArgreSettings,
    on_step: OnStep | None = None,
) -> tuple[RewardHead, ArgreReport]:
    """Fit the direction and the reward head.

    The same inputs and seed give the same head on the same machine and number of threads.

    Args:
        positives: one (tokens, width) float32 tensor for each pair: hidden states of the wanted
            text, without the prompt, if the pair has one.
        negatives: likewise, of the unwanted text.
        settings: the fit's settings.
        on_step: called after every step.

    Returns:
        The head, float32 on the device of the hidden states; and the report.

    Raises:
        FitError: there are no pairs, a text has no tokens, the direction is zero, or the loss is
            no longer finite.
    """
    _check_pairs(positives, negatives)
    direction = mean_direction(positives, negatives)
    if not direction.norm() > 0:
        raise FitError("positives and negatives end in the same hidden states: no direction")
    generator = torch.Generator().manual_seed(settings.seed)
    head = _initial_head(direction, settings.hidden_units, generator)
    losses = _train(head, positives, negatives, settings, generator, on_step)
    return _finish(head, positives, negatives, losses)


def _check_pairs(positives: Sequence[Tensor], negatives: Sequence[Tensor]) -> None:
    if not positives or len(positives) != len(negatives):
        raise FitError("a fit needs pairs: at least one, with as many positives as negatives")
    if min(len(states) for states in (*positives, *negatives)) == 0:
        raise FitError("a text of a pair has no token")


def _initial_head(direction: Tensor, hidden_units: int, generator: torch.Generator) -> RewardHead:
    """Return a head of two linear layers, initialised as torch does, but from `generator`."""

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


def _train(
    head: RewardHead,
    positives: Sequence[Tensor],
    negatives: Sequence[Tensor],
    settings: ArgreSettings,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> list[list[float]]:
    """Optimise the head in place. Returns the losses of every epoch's steps."""
    unit = head.direction / head.direction.norm()
    steps_an_epoch = math.ceil(len(positives) / settings.batch_size)
    total = steps_an_epoch * settings.epochs
    optimizer = torch.optim.AdamW(
        [head.w1, head.b1, head.w2, head.b2],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warmup_then_cosine(min(settings.warmup_steps, total // 10), total)
    )
    losses: list[list[float]] = []
    for epoch in range(settings.epochs):
        losses.append([])
        order = torch.randperm(len(positives), generator=generator)
        for rows in torch.split(order, settings.batch_size):
            positive, negative, mask = common_tokens(positives, negatives, rows.tolist())
            points = interpolate(positive, negative, unit, settings.interpolations)
            rewards = reward(head, points)
            loss = preference_loss(rewards, mask, settings.beta, settings.center)
            if not math.isfinite(loss.item()):
                raise FitError("the loss is no longer finite: lower the learning rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses[-1].append(loss.item())
            if on_step is not None:
                on_step(epoch * steps_an_epoch + len(losses[-1]), total, loss.item())
    return losses


def _warmup_then_cosine(warmup: int, total: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


@torch.no_grad()
def _finish(
    head: RewardHead,
    positives: Sequence[Tensor],
    negatives: Sequence[Tensor],
    losses: list[list[float]],
) -> tuple[RewardHead, ArgreReport]:
    positive_rewards = [reward(head, states) for states in positives]
    negative_rewards = [reward(head, states) for states in negatives]
    right = [
        bool(positive.mean() > negative.mean())
        for positive, negative in zip(positive_rewards, negative_rewards, strict=True)
    ]
    positive_reward = torch.cat(positive_rewards).mean()
    finished = RewardHead(
        w1=head.w1.detach(),
        b1=head.b1.detach(),
        w2=head.w2.detach(),
        b2=head.b2.detach(),
        direction=head.direction,
        positive_reward=positive_reward,
    )
    report = ArgreReport(
        initial_loss=_mean(losses[0]),
        final_loss=_mean(losses[-1]),
        accuracy=sum(right) / len(right),
        positive_reward=positive_reward.item(),
        negative_reward=torch.cat(negative_rewards).mean().item(),
        direction_norm=head.direction.norm().item(),
    )
    return finished, report


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
