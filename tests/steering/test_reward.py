"""Tests reward heads, and the refinement of rows by them, against slow references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.reward import apply_reward, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.refinement import SETTINGS, columns
from tests.tiny import WIDTH, random_head


@given(seed=st.integers(0, 10_000), settings=st.lists(SETTINGS, min_size=1, max_size=9))
def test_each_row_is_refined_by_its_own_settings(seed: int, settings: list[RewardSettings]) -> None:
    head = random_head(seed)
    h = torch.randn(len(settings), WIDTH, generator=torch.Generator().manual_seed(seed))
    refined = apply_reward(h, head, *columns(settings))
    expected = torch.stack(
        [oracles.reward(row, head, own) for row, own in zip(h, settings, strict=True)]
    )
    torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-4)


def test_reward_equals_the_reference() -> None:
    head = random_head(1)
    h = torch.randn(5, WIDTH)
    expected = torch.stack([oracles.reward_of(row, head) for row in h])
    torch.testing.assert_close(reward(head, h), expected)


def test_refinement_runs_where_the_gap_is_closed_and_the_directional_step_does_not() -> None:
    head = random_head(2)
    h = 3 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    above = h[reward(head, h) > head.positive_reward]
    assert len(above) > 0

    def refined(iterations: int) -> torch.Tensor:
        rows = len(above)
        return apply_reward(
            above, head, torch.ones(rows, 1), step_sizes=torch.full((rows, iterations), 0.5)
        )

    assert torch.equal(refined(0), above)
    assert (reward(head, refined(3)) > reward(head, above)).all()


@pytest.mark.parametrize(
    ("settings", "nothing"),
    [
        (RewardSettings(0.0, 5, 0.0), True),
        (RewardSettings(0.5, 0, 0.0), True),
        (RewardSettings(0.5, 0, 1.0), False),
        (RewardSettings(0.5, 5, 0.0), False),
    ],
)
def test_which_settings_do_nothing(settings: RewardSettings, nothing: bool) -> None:
    assert settings.does_nothing is nothing
