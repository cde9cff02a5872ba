"""Tests ARGRE fits: ranking, r_plus, held-out pairs, neutral texts, determinism, memory."""

from contextlib import ExitStack
from dataclasses import replace
from io import FileIO
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steering.fit import FitError
from steering.fit.argre import fit_argre
from steering.fit.argre_settings import ArgreSettings
from steering.fit.directions import principal_direction
from steering.fit.hidden_states import SpooledStates
from steering.reward import RewardHead, reward
from tests.allocations import PeakBytes

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
    head, report = fit_argre(positives, negatives, replace(_SETTINGS, held_out=0.0))
    torch.testing.assert_close(head.positive_reward, reward(head, torch.cat(positives)).mean())
    assert report.positive_reward == pytest.approx(head.positive_reward.item())
    ends = [(one[-1] - other[-1]) for one, other in zip(positives, negatives, strict=True)]
    assert torch.equal(head.direction, torch.stack(ends).mean(dim=0))
    assert report.direction_norm == pytest.approx(head.direction.norm().item())
    assert head.w1.shape == (32, 8)
    assert head.b1.shape == head.w2.shape == (32,)
    assert head.b2.shape == head.positive_reward.shape == ()
    assert not head.w1.requires_grad


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 1.0])
def test_the_positive_reward_may_be_a_quantile(quantile: float) -> None:
    positives, negatives = _pairs(20, seed=3)
    settings = replace(_SETTINGS, held_out=0.0, reward_quantile=quantile)
    head, _ = fit_argre(positives, negatives, settings)
    rewards = torch.cat([reward(head, states) for states in positives])
    assert torch.equal(
        head.positive_reward, torch.quantile(rewards, quantile, interpolation="nearest")
    )


def test_the_direction_may_be_the_principal_component() -> None:
    positives, negatives = _pairs(30, seed=4)
    settings = replace(_SETTINGS, held_out=0.0, direction="principal-component")
    head, report = fit_argre(positives, negatives, settings)
    ends = [(one[-1] - other[-1]) for one, other in zip(positives, negatives, strict=True)]
    assert torch.equal(head.direction, principal_direction(torch.stack(ends)))
    assert report.direction_norm == pytest.approx(1)


def test_held_out_pairs_are_measured_and_have_no_part_in_the_fit() -> None:
    positives, negatives = _pairs(10, seed=5)
    # One epoch, so that there is none to select.
    settings = replace(_SETTINGS, held_out=0.25, epochs=1)
    head, report = fit_argre(positives, negatives, settings)
    assert (report.training_pairs, report.held_out_pairs) == (8, 2)
    held_out = []
    for row in range(10):
        texts = [states + 1 if index == row else states for index, states in enumerate(positives)]
        if _equal(fit_argre(texts, negatives, settings)[0], head):
            held_out.append(row)
    assert len(held_out) == 2
    rewards = [(reward(head, positives[row]), reward(head, negatives[row])) for row in held_out]
    right = [bool(positive.sum() > negative.sum()) for positive, negative in rewards]
    assert report.held_out_accuracy == sum(right) / 2
    sides = zip(*rewards, strict=True)
    gaps = [torch.relu(head.positive_reward - torch.cat(side)).mean() for side in sides]
    assert report.positive_gap == pytest.approx(gaps[0].item())
    assert report.negative_gap == pytest.approx(gaps[1].item())
    assert report.neutral_gap is None


def test_too_few_pairs_to_hold_any_out_keep_the_last_epoch() -> None:
    _, report = fit_argre(*_pairs(9, seed=6), _SETTINGS)
    assert (report.training_pairs, report.held_out_pairs, report.best_epoch) == (9, 0, 3)
    assert report.held_out_accuracy is None
    assert report.held_out_loss is None


def test_neutral_texts_have_little_gap_to_close() -> None:
    positives, negatives = _pairs(40, seed=7)
    generator = torch.Generator().manual_seed(8)
    # Texts of another kind: far from the pairs' in a coordinate that the direction does not have.
    offset = 3 * torch.eye(8)[4]
    neutral = [torch.randn(6, 8, generator=generator) + offset for _ in range(40)]
    settings = replace(_SETTINGS, epochs=10)
    alone, without = fit_argre(positives, negatives, settings)
    head, report = fit_argre(positives, negatives, settings, neutral=neutral)
    _, paired = fit_argre(
        positives, negatives, replace(settings, neutral_weight=0.0), None, neutral
    )
    assert report.training_pairs == 36
    assert torch.equal(head.direction, alone.direction)
    assert without.neutral_gap is None
    assert report.neutral_gap is not None
    assert paired.neutral_gap is not None
    # Rewards have no scale of their own: gaps are compared with those of negatives.
    assert report.neutral_gap / report.negative_gap < 0.1
    assert paired.neutral_gap / paired.negative_gap > 0.15
    unseen = torch.randn(500, 8, generator=generator) + offset
    gap = torch.relu(head.positive_reward - reward(head, unseen)).mean().item()
    assert gap / report.negative_gap < 0.1


def test_texts_are_read_when_they_are_needed_and_dropped(tmp_path: Path) -> None:
    def peak(pairs: int) -> int:
        with ExitStack() as opened:
            files = [opened.enter_context(FileIO(tmp_path / name, "w+")) for name in "+-"]
            sides = [SpooledStates(file, torch.device("cpu")) for file in files]
            for index, side in product(range(pairs), sides):
                side.write(index, torch.randn(50, 32))
            allocated = PeakBytes()
            with allocated:
                fit_argre(sides[0], sides[1], replace(_SETTINGS, epochs=1))
        return allocated.peak

    size = 2 * 50 * 32 * 4  # bytes of a pair's hidden states
    # A few rows of a pair and its rewards stay: the differences of last tokens, r_plus's numbers.
    assert peak(72) - peak(8) < 64 * size / 8


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
