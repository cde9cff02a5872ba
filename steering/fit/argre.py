"""Fits ARGRE's direction and reward head on hidden states of preference pairs.

`steering.fit.directions` finds the direction, `steering.fit.preferences` defines the loss, and
`steering.fit.reward_training` optimises the head. Hidden states are read text by text, so that
`steering.fit.hidden_states.SpooledStates` can keep them outside of memory. Beside those of one
optimizer step, memory holds one row of hidden states for each pair (the direction is made of
these) and one number for each token (its reward).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from steering.fit import FitError, OnStep
from steering.fit.argre_settings import ArgreSettings
from steering.fit.directions import find_direction
from steering.fit.hidden_states import TextStates
from steering.fit.preferences import Preferences
from steering.fit.reward_training import TrainedHead, evaluate, initial_head, train_reward
from steering.reward import RewardHead, reward


@dataclass(frozen=True, slots=True)
class ArgreReport:
    """The measures of a fit. A gap is the mean of max(0, positive_reward - reward) over tokens."""

    training_pairs: int
    held_out_pairs: int
    initial_loss: float  # mean over the first epoch's steps
    final_loss: float  # mean over the last epoch's steps
    best_epoch: int  # the kept head's, counted from 1
    accuracy: float  # share of training pairs whose positive has the larger sum of rewards
    held_out_accuracy: float | None  # likewise, of the held-out pairs; None if there are none
    held_out_loss: float | None  # mean of `preferences.pair_loss` over the held-out pairs
    positive_reward: float  # r_plus, up to which an edit closes the gap
    negative_reward: float  # mean over the training negatives' tokens
    positive_gap: float  # of held-out positives, or of the training's if none are held out
    negative_gap: float  # of negatives, likewise
    neutral_gap: float | None  # of neutral texts, likewise; None if there are none
    direction_norm: float


def fit_argre(
    positives: TextStates,
    negatives: TextStates,
    settings: ArgreSettings,
    on_step: OnStep | None = None,
    neutral: TextStates = (),
) -> tuple[RewardHead, ArgreReport]:
    """Fit the direction and the reward head.

    The same inputs and seed give the same head on the same machine and number of threads. Pairs
    and neutral texts that are held out have no part in the direction, the training and r_plus.

    Args:
        positives: one (tokens, width) float32 tensor for each pair: hidden states of the wanted
            text, without the prompt, if the pair has one.
        negatives: likewise, of the unwanted text.
        settings: the fit's settings.
        on_step: called after every step.
        neutral: likewise, of texts that the intervention is to leave alone. They are positives
            without a negative (see `steering.fit.preferences`), and count for r_plus as such.

    Returns:
        The head, float32 on the device of the hidden states; and the report.

    Raises:
        FitError: there are no pairs, a text has no tokens, there is no direction, or the loss is
            no longer finite.
    """
    _check_texts(positives, negatives, neutral)
    generator = torch.Generator().manual_seed(settings.seed)
    rows, held_out_rows = _split(len(positives), settings.held_out, generator)
    neutral_rows, held_out_neutral = _split(len(neutral), settings.held_out, generator)
    # A last token is a view of its whole text, but a difference is not, and keeps only its row.
    differences = torch.stack([positives[row][-1] - negatives[row][-1] for row in rows])
    direction = find_direction(differences, settings.direction)
    unit = direction / direction.norm()
    shift = (differences.mean(dim=0) @ unit) * unit
    training = Preferences(positives, negatives, rows, neutral, neutral_rows, shift)
    held_out = replace(training, rows=held_out_rows, neutral_rows=held_out_neutral)
    head = initial_head(direction, settings.hidden_units, generator)
    trained = train_reward(head, training, held_out.without_neutral(), settings, generator, on_step)
    head = replace(trained.head, positive_reward=_positive_reward(trained.head, training, settings))
    return head, _report(replace(trained, head=head), training, held_out, settings)


def _check_texts(positives: TextStates, negatives: TextStates, neutral: TextStates) -> None:
    if not len(positives) or len(positives) != len(negatives):
        raise FitError("a fit needs pairs: at least one, with as many positives as negatives")
    for states in chain(positives, negatives, neutral):
        if not len(states):
            raise FitError("a text has no token to fit on")


def _split(count: int, share: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Draw a share of the rows, rounded down; return the others and the drawn, each in order."""
    held_out = int(count * share)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


@torch.no_grad()
def _positive_reward(head: RewardHead, training: Preferences, settings: ArgreSettings) -> Tensor:
    """Return r_plus, () float32: the positives' mean token reward, or the settings' quantile."""
    rewards = _token_rewards(head, chain(training.each_positive(), training.each_neutral()))
    if settings.reward_quantile is None:
        return rewards.mean()
    # torch.quantile refuses more than 2**24 numbers.
    return rewards.kthvalue(1 + round(settings.reward_quantile * (len(rewards) - 1))).values


@torch.no_grad()
def _report(
    trained: TrainedHead, training: Preferences, held_out: Preferences, settings: ArgreSettings
) -> ArgreReport:
    head = trained.head
    on_training = evaluate(head, training.without_neutral(), settings)
    assert on_training is not None  # there is a pair to train on
    measured = held_out if held_out.rows else training
    measured_neutral = held_out if held_out.neutral_rows else training
    return ArgreReport(
        training_pairs=len(training.rows),
        held_out_pairs=len(held_out.rows),
        initial_loss=trained.epoch_losses[0],
        final_loss=trained.epoch_losses[-1],
        best_epoch=trained.epoch,
        accuracy=on_training.accuracy,
        held_out_accuracy=trained.held_out.accuracy if trained.held_out else None,
        held_out_loss=trained.held_out.loss if trained.held_out else None,
        positive_reward=head.positive_reward.item(),
        negative_reward=_token_rewards(head, training.each_negative()).mean().item(),
        positive_gap=_gap(head, measured.each_positive()),
        negative_gap=_gap(head, measured.each_negative()),
        neutral_gap=_gap(head, measured_neutral.each_neutral()) if training.neutral_rows else None,
        direction_norm=head.direction.norm().item(),
    )


def _gap(head: RewardHead, texts: Iterable[Tensor]) -> float:
    gaps = torch.relu(head.positive_reward - _token_rewards(head, texts))
    return gaps.mean().item()


def _token_rewards(head: RewardHead, texts: Iterable[Tensor]) -> Tensor:
    """Return the rewards of all of the texts' tokens, (tokens,) float32."""
    return torch.cat([reward(head, states) for states in texts])
