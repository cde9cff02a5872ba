"""Tests the training of reward heads: gradient, schedule, and the epoch that is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from steering.fit import FitError
from steering.fit.argre_settings import ArgreSettings
from steering.fit.preferences import Preferences, common_tokens, path_rewards, preference_loss
from steering.fit.reward_training import (
    Evaluation,
    TrainedHead,
    evaluate,
    initial_head,
    train_reward,
    warmup_then_cosine,
)
from steering.reward import RewardHead, apply_reward, reward

_SETTINGS = ArgreSettings(hidden_units=16, epochs=4, learning_rate=3e-3)


def _preferences(count: int, seed: int, noise: float = 1.0) -> Preferences:
    generator = torch.Generator().manual_seed(seed)
    sides: list[list[Tensor]] = []
    for shift in (1.0, -1.0):
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        texts = [noise * torch.randn(length, 8, generator=generator) for length in lengths]
        sides.append([text + shift * torch.eye(8)[0] for text in texts])
    return Preferences(sides[0], sides[1], list(range(count)), [], [], torch.zeros(8))


def _train(
    training: Preferences, held_out: Preferences, settings: ArgreSettings = _SETTINGS
) -> TrainedHead:
    generator = torch.Generator().manual_seed(0)
    head = initial_head(torch.eye(8)[0], settings.hidden_units, generator)
    return train_reward(head, training, held_out, settings, generator)


def _none() -> Preferences:
    return replace(_preferences(1, seed=0), rows=[])


def test_the_served_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    head = initial_head(torch.ones(8), 32, torch.Generator().manual_seed(1))
    rows = torch.randn(50, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(reward(head, rows).sum(), rows)
    h = rows.detach()
    with torch.no_grad():
        closed_form = ((h @ head.w1.T + head.b1 > 0) * head.w2) @ head.w1
        # One served step of size 1, without the directional step.
        served = apply_reward(h, head, torch.zeros(50, 1), torch.ones(50, 1)) - h
    torch.testing.assert_close(closed_form, expected)
    torch.testing.assert_close(served, expected, atol=1e-6, rtol=1e-4)


def test_a_first_step_is_what_the_definitions_and_adamw_make() -> None:
    training = _preferences(3, seed=1)
    settings = replace(_SETTINGS, epochs=1, batch_size=3, warmup_steps=0)
    trained = _train(training, _none(), settings)
    head = initial_head(torch.eye(8)[0], 16, torch.Generator().manual_seed(0))
    positive, negative, mask = common_tokens([training[index] for index in range(3)])
    rewards = path_rewards(head, positive, negative, torch.eye(8)[0], 7)
    loss = preference_loss(rewards, mask, 0.05, 0.01)
    (gradient,) = torch.autograd.grad(loss, head.w1)
    expected = head.w1 * (1 - 3e-3 * 0.05) - 3e-3 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(trained.head.w1, expected.detach(), atol=1e-6, rtol=1e-4)
    assert trained.epoch_losses[0] == pytest.approx(loss.item(), rel=1e-5)


def test_a_batch_that_is_larger_than_all_pairs_is_all_pairs() -> None:
    training = _preferences(3, seed=1)
    settings = replace(_SETTINGS, epochs=2, batch_size=3)
    all_pairs = _train(training, _none(), settings)
    larger = _train(training, _none(), replace(settings, batch_size=2**63))
    assert larger.epoch_losses == all_pairs.epoch_losses


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (10, 100), (100, 1500)])
def test_the_schedule_is_the_one_that_the_authors_use(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    ours = warmup_then_cosine(warmup, total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_evaluation_is_of_whole_texts_without_a_path() -> None:
    preferences = _preferences(20, seed=2)
    head = initial_head(torch.eye(8)[0], 16, torch.Generator().manual_seed(3))
    right, losses = 0, []
    for positive, negative in zip(preferences.positives, preferences.negatives, strict=True):
        chosen, rejected = reward(head, positive), reward(head, negative)
        right += int(chosen.sum() > rejected.sum())
        centre = 0.01 * (chosen.mean() + rejected.mean()) ** 2
        margin = 0.05 * (chosen.sum() - rejected.sum())
        losses.append((torch.log(1 + torch.exp(-margin)) + centre).item())
    measured = evaluate(head, preferences, _SETTINGS)
    assert measured is not None
    assert measured.accuracy == right / 20
    assert measured.loss == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert evaluate(head, _none(), _SETTINGS) is None


@pytest.mark.parametrize(
    ("better", "worse"),
    [((0.9, 5.0), (0.8, 1.0)), ((0.8, 1.0), (0.8, 2.0))],
)
def test_accuracy_selects_and_the_loss_breaks_ties(
    better: tuple[float, float], worse: tuple[float, float]
) -> None:
    assert Evaluation(*better).is_better_than(Evaluation(*worse))
    assert not Evaluation(*worse).is_better_than(Evaluation(*better))
    assert not Evaluation(*better).is_better_than(Evaluation(*better))


def test_the_best_epochs_head_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_out = _preferences(12, seed=4), _preferences(5, seed=5)
    accuracies = iter([0.5, 0.75, 0.75, 0.25])
    heads: list[RewardHead] = []

    def measured(head: RewardHead, _pairs: Preferences, _settings: ArgreSettings) -> Evaluation:
        heads.append(replace(head, w1=head.w1.detach().clone()))
        return Evaluation(next(accuracies), 1.0)

    monkeypatch.setattr("steering.fit.reward_training.evaluate", measured)
    trained = _train(training, held_out)
    assert trained.epoch == 2
    assert trained.held_out == Evaluation(0.75, 1.0)
    assert len(trained.epoch_losses) == 4
    assert torch.equal(trained.head.w1, heads[1].w1)
    assert not torch.equal(trained.head.w1, heads[2].w1)
    assert not trained.head.w1.requires_grad


def test_training_that_makes_things_worse_keeps_the_first_epoch() -> None:
    training = _preferences(40, seed=6)
    # The held-out pairs prefer the opposite: the less that is learnt, the better.
    held_out = replace(training, positives=training.negatives, negatives=training.positives)
    trained = _train(training, held_out)
    assert trained.epoch == 1
    assert trained.held_out is not None
    assert trained.held_out == evaluate(trained.head, held_out, _SETTINGS)


def test_without_held_out_pairs_the_last_epoch_is_kept() -> None:
    trained = _train(_preferences(12, seed=7), _none())
    assert trained.epoch == 4
    assert trained.held_out is None


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(FitError, match="lower the learning rate"):
        _train(_preferences(12, seed=8), _none(), replace(_SETTINGS, learning_rate=1e30))
