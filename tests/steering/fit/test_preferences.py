"""Tests ARGRE's path and loss against loops, and the pairs that neutral texts make."""

import math

import pytest
import torch
from torch import Tensor

from steering.fit.preferences import (
    Preferences,
    common_tokens,
    pair_loss,
    path_rewards,
    preference_loss,
    shortfall,
)
from steering.fit.reward_training import initial_head
from steering.reward import RewardHead, reward


def _head(width: int) -> RewardHead:
    return initial_head(torch.ones(width), 16, torch.Generator().manual_seed(1))


def _path(positive: Tensor, negative: Tensor, unit: Tensor, interpolations: int) -> Tensor:
    """Return the path of the module's docstring, by loops: (interpolations + 2, n, width)."""
    points = torch.empty(interpolations + 2, *positive.shape)
    for index in range(interpolations + 2):
        for token in range(len(positive)):
            difference = negative[token] - positive[token]
            along = sum(float(d * u) for d, u in zip(difference, unit, strict=True))
            alpha = index / (interpolations + 1)
            points[index, token] = positive[token] + alpha * along * unit
    return points


@pytest.mark.parametrize("interpolations", [0, 1, 7])
def test_the_rewards_on_the_path_and_their_gradients_are_those_of_its_points(
    interpolations: int,
) -> None:
    torch.manual_seed(0)
    head, positive, negative = _head(4), torch.randn(6, 4), torch.randn(6, 4)
    direction = torch.randn(4)
    unit = direction / direction.norm()
    rewards = path_rewards(
        head, positive.view(2, 3, 4), negative.view(2, 3, 4), unit, interpolations
    )
    expected = reward(head, _path(positive, negative, unit, interpolations))
    assert rewards.shape == (interpolations + 2, 2, 3)
    torch.testing.assert_close(rewards.flatten(1), expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn(expected.shape)
    parameters = [head.w1, head.b1, head.w2, head.b2]
    torch.testing.assert_close(
        torch.autograd.grad((rewards.flatten(1) * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_path_moves_along_the_direction_only() -> None:
    positive, negative = torch.randn(3, 5), torch.randn(3, 5)
    head, unit = _head(5), torch.eye(5)[2]
    rewards = path_rewards(head, positive, negative, unit, interpolations=1)
    end = positive.clone()
    end[:, 2] = negative[:, 2]
    torch.testing.assert_close(rewards[0], reward(head, positive))
    torch.testing.assert_close(rewards[-1], reward(head, end), atol=1e-6, rtol=1e-5)


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


def test_the_loss_of_a_pair_is_what_loops_compute() -> None:
    torch.manual_seed(0)
    positive, negative = torch.randn(5), torch.randn(3)
    margin = 0.05 * (sum(positive.tolist()) - sum(negative.tolist()))
    means = sum(positive.tolist()) / 5 + sum(negative.tolist()) / 3
    expected = math.log(1 + math.exp(-margin)) + 0.01 * means**2
    assert pair_loss(positive, negative, 0.05, 0.01).item() == pytest.approx(expected, rel=1e-5)


def test_the_term_for_neutral_texts_is_what_loops_compute() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(3, 4, requires_grad=True)
    lengths = (4, 2, 3)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    counted = [rewards[row, :length] for row, length in enumerate(lengths)]
    target = torch.cat(counted).mean().item()
    gaps = [max(0.0, target - value) ** 2 for row in (0, 2) for value in counted[row].tolist()]
    term = shortfall(rewards, mask, torch.tensor([True, False, True]))
    assert term.item() == pytest.approx(sum(gaps) / 7, rel=1e-5)
    (gradient,) = torch.autograd.grad(term, rewards)
    expected = -2 * torch.relu(target - rewards.detach()) / 7 * mask
    expected[1] = 0
    torch.testing.assert_close(gradient, expected)
    assert shortfall(rewards, mask, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_a_batch_has_the_tokens_that_both_texts_have() -> None:
    pairs = [(torch.ones(2, 4), 2 * torch.ones(3, 4)), (3 * torch.ones(5, 4), 4 * torch.ones(1, 4))]
    positives, negatives, mask = common_tokens(pairs)
    assert positives[..., 0].tolist() == [[1, 1], [3, 0]]
    assert negatives[..., 0].tolist() == [[2, 2], [4, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_a_neutral_text_is_a_positive_whose_negative_is_moved_against_the_direction() -> None:
    torch.manual_seed(0)
    texts = [torch.randn(length, 4) for length in (2, 3, 1, 4, 2, 6)]
    shift = torch.randn(4)
    preferences = Preferences(texts[:2], texts[2:4], [1], texts[4:], [1, 0], shift)
    assert len(preferences) == 3
    pairs = [preferences[index] for index in range(3)]
    assert pairs[0][0] is texts[1]
    assert pairs[0][1] is texts[3]
    for (positive, negative), neutral in zip(pairs[1:], (texts[5], texts[4]), strict=True):
        assert torch.equal(positive, neutral)
        torch.testing.assert_close(negative + shift, neutral)
    assert len(preferences.without_neutral()) == 1
    assert list(map(len, preferences.each_positive())) == [3]
    assert list(map(len, preferences.each_negative())) == [4]
    assert list(map(len, preferences.each_neutral())) == [6, 2]
