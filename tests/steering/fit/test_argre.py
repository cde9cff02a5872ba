"""Tests ARGRE fits: direction, path and loss against loops; ranking; determinism."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.fit import FitError
from steering.fit.argre import ArgreSettings, fit_argre
from steering.fit.preferences import interpolate, mean_direction, preference_loss
from steering.reward import RewardHead, reward

_SETTINGS = ArgreSettings(hidden_units=32, learning_rate=5e-3)


def _pairs(count: int, seed: int, width: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """Return random hidden states, shifted in the first number: positives by 1, negatives by -1."""
    generator = torch.Generator().manual_seed(seed)
    sides: list[list[Tensor]] = []
    for shift in (1.0, -1.0):
        lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
        states = [torch.randn(length, width, generator=generator) for length in lengths]
        for rows in states:
            rows[:, 0] += shift
        sides.append(states)
    return sides[0], sides[1]


def _equal(one: RewardHead, other: RewardHead) -> bool:
    names = ("w1", "b1", "w2", "b2", "direction", "positive_reward")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_direction_is_the_mean_difference_of_last_tokens() -> None:
    positives, negatives = _pairs(5, seed=0)
    expected = [0.0] * 8
    for positive, negative in zip(positives, negatives, strict=True):
        for axis in range(8):
            expected[axis] += (positive[-1, axis] - negative[-1, axis]).item() / 5
    torch.testing.assert_close(mean_direction(positives, negatives), torch.tensor(expected))


def test_the_path_is_what_loops_compute() -> None:
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    direction = torch.randn(4)
    unit = direction / direction.norm()
    points = interpolate(positive, negative, unit, interpolations=7)
    assert points.shape == (9, 2, 3, 4)
    for index in range(9):
        alpha = index / 8
        for pair in range(2):
            for token in range(3):
                difference = negative[pair, token] - positive[pair, token]
                along = sum(float(d * u) for d, u in zip(difference, unit, strict=True))
                expected = positive[pair, token] + alpha * along * unit
                torch.testing.assert_close(points[index, pair, token], expected)


def test_the_path_moves_along_the_direction_only() -> None:
    positive, negative = torch.randn(3, 5), torch.randn(3, 5)
    unit = torch.eye(5)[2]
    points = interpolate(positive, negative, unit, interpolations=1)
    assert torch.equal(points[0], positive)
    torch.testing.assert_close(points[-1][:, 2], negative[:, 2])
    assert torch.equal(points[-1][:, :2], positive[:, :2])


def test_the_loss_is_what_loops_compute() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(3, 2, 4)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    preferences, centers = [], []
    for point in range(2):
        for pair, length in enumerate((3, 1)):
            chosen = rewards[point, pair, :length]
            rejected = rewards[point + 1, pair, :length]
            margin = 0.05 * (chosen.sum() - rejected.sum())
            preferences.append(torch.log(1 + torch.exp(-margin)))
            centers.append((chosen.mean() + rejected.mean()) ** 2)
    expected = torch.stack(preferences).mean() + 0.01 * torch.stack(centers).mean()
    torch.testing.assert_close(preference_loss(rewards, mask, beta=0.05, center=0.01), expected)


def test_the_reward_ranks_pairs_that_it_never_saw() -> None:
    head, report = fit_argre(*_pairs(200, seed=1), _SETTINGS)
    positives, negatives = _pairs(200, seed=2)
    right = [
        bool(reward(head, positive).mean() > reward(head, negative).mean())
        for positive, negative in zip(positives, negatives, strict=True)
    ]
    assert sum(right) / len(right) > 0.95
    assert report.accuracy > 0.95
    assert report.final_loss < report.initial_loss
    assert report.positive_reward > report.negative_reward


def test_the_positive_reward_is_the_mean_over_all_positive_tokens() -> None:
    positives, negatives = _pairs(20, seed=3)
    head, report = fit_argre(positives, negatives, _SETTINGS)
    torch.testing.assert_close(head.positive_reward, reward(head, torch.cat(positives)).mean())
    assert report.positive_reward == pytest.approx(head.positive_reward.item())
    assert torch.equal(head.direction, mean_direction(positives, negatives))
    assert report.direction_norm == pytest.approx(head.direction.norm().item())
    assert head.w1.shape == (32, 8)
    assert head.b1.shape == head.w2.shape == (32,)
    assert head.b2.shape == head.positive_reward.shape == ()
    assert not head.w1.requires_grad


def test_a_seed_decides_everything() -> None:
    pairs = _pairs(20, seed=4)
    first, _ = fit_argre(*pairs, _SETTINGS)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second, _ = fit_argre(*pairs, _SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    third, _ = fit_argre(*pairs, replace(_SETTINGS, seed=1))
    assert _equal(first, second)
    assert not _equal(first, third)


def test_only_tokens_that_both_texts_have_train_the_head() -> None:
    torch.manual_seed(0)
    lengths = (2, 5, 3, 4)
    negatives = [torch.randn(length, 8) for length in lengths]
    positives = [torch.randn(length + 4, 8) for length in lengths]
    others = [rows.clone() for rows in positives]
    for rows, length in zip(others, lengths, strict=True):
        # These tokens are beyond the negative's length, and not the last, which sets the direction.
        rows[length:-1] = torch.randn(3, 8)
    head, _ = fit_argre(positives, negatives, _SETTINGS)
    other, _ = fit_argre(others, negatives, _SETTINGS)
    assert torch.equal(head.w1, other.w1)
    assert torch.equal(head.w2, other.w2)
    assert not torch.equal(head.positive_reward, other.positive_reward)


@pytest.mark.parametrize(
    ("positives", "negatives", "message"),
    [
        ([], [], "at least one"),
        ([torch.ones(1, 2)], [], "as many"),
        ([torch.ones(0, 2)], [torch.ones(1, 2)], "no token"),
        ([torch.ones(1, 2)], [torch.ones(1, 2)], "no direction"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    positives: list[Tensor], negatives: list[Tensor], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit_argre(positives, negatives, _SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_units", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("interpolations", -1),
        ("warmup_steps", -1),
        ("seed", -1),
        ("beta", 0.0),
        ("learning_rate", float("nan")),
        ("center", -1.0),
        ("weight_decay", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(FitError, match=field):
        replace(ArgreSettings(), **{field: value})
