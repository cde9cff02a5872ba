from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steering.reward import RewardHead, apply_reward, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.tiny import WIDTH, random_head

SETTINGS = st.builds(
    RewardSettings,
    eta=st.floats(0, 1),
    iterations=st.integers(0, 6),
    direction_scale=st.floats(0, 2),
)


CPU = torch.device("cpu")


def refine(h: Tensor, head: RewardHead, settings: Sequence[RewardSettings]) -> Tensor:
    """Each row with its own settings."""
    return apply_reward(
        h,
        head,
        eta=torch.tensor([row.eta for row in settings])[:, None],
        iterations=torch.tensor([row.iterations for row in settings])[:, None],
        direction_scale=torch.tensor([row.direction_scale for row in settings])[:, None],
        max_iterations=max(row.iterations for row in settings),
    )


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("units", [24, 25])
@given(seed=st.integers(0, 10_000), settings=st.lists(SETTINGS, min_size=1, max_size=9))
def test_each_row_is_refined_by_its_own_settings(
    prepared: bool, units: int, seed: int, settings: list[RewardSettings]
) -> None:
    head = random_head(seed, units=units)
    h = torch.randn(len(settings), WIDTH, generator=torch.Generator().manual_seed(seed))
    refined = refine(h, head.to(CPU) if prepared else head, settings)
    expected = torch.stack(
        [oracles.reward(row, head, own) for row, own in zip(h, settings, strict=True)]
    )
    torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 4, 33])
def test_many_steps_that_flip_many_units_equal_the_reference(rows: int) -> None:
    """As wide as a real head's, whose gradient is kept from step to step."""
    head = random_head(3, width=96, units=1024).to(CPU)
    assert head.prepared is not None
    h = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    settings = RewardSettings(eta=0.3, iterations=20, direction_scale=1.0)
    refined = refine(h, head, [settings] * rows)
    expected = torch.stack([oracles.reward(row, head, settings) for row in h])
    flips = ((head.units(h) > 0) != (head.units(refined) > 0)).sum(dim=1)
    assert (flips > 20).all()
    # A unit that is zero but for rounding may pass a step earlier or later.
    difference = (refined - expected).norm(dim=1) / (expected - h).norm(dim=1)
    assert (difference < 0.02).all()
    assert difference.median() < 1e-5


@pytest.mark.parametrize("rows", [2, 8])
def test_a_rows_bits_do_not_depend_on_the_other_rows(rows: int) -> None:
    head = random_head(4, width=96, units=256).to(CPU)
    random = torch.Generator().manual_seed(0)
    row = torch.randn(1, 96, generator=random)
    own = RewardSettings(eta=0.5, iterations=4, direction_scale=0.7)
    seen = set()
    for strength in (0.0, 0.1, 3.0):
        others = RewardSettings(eta=strength, iterations=9, direction_scale=strength)
        h = torch.cat((row, torch.randn(rows - 1, 96, generator=random)))
        refined = refine(h, head, [own, *[others] * (rows - 1)])
        seen.add(tuple(refined[0].tolist()))
    assert len(seen) == 1


def test_a_head_too_wide_for_its_gram_matrix_is_refined_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("steering.reward._MOST_UNITS", 24)
    h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    settings = [RewardSettings(0.5, 3, 1.0)] * 5
    for units in (24, 26):
        head = random_head(1, units=units).to(CPU)
        assert (head.prepared is None) is (units == 26)
        expected = torch.stack([oracles.reward(row, head, settings[0]) for row in h])
        torch.testing.assert_close(refine(h, head, settings), expected, rtol=1e-4, atol=1e-4)


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
            above,
            head,
            eta=torch.full((rows, 1), 0.5),
            iterations=torch.full((rows, 1), iterations),
            direction_scale=torch.ones(rows, 1),
            max_iterations=iterations,
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


@pytest.mark.parametrize("prepared", [False, True])
def test_a_reward_that_is_not_a_number_shows(prepared: bool) -> None:
    """It must not leave the row as it is: that would be the base model, in silence."""
    head = replace(random_head(0), w1=torch.full((24, WIDTH), 3e38))
    head = head.to(CPU) if prepared else head
    h = torch.linspace(0.5, 1, WIDTH)[None]
    assert not reward(head, h).isfinite().all()
    ones = torch.ones(1, 1)
    refined = apply_reward(h, head, 0 * ones, ones.long(), ones, max_iterations=1)
    assert not refined.isfinite().all()
    untouched = apply_reward(h, head, 0 * ones, 0 * ones.long(), 0 * ones, max_iterations=0)
    assert torch.equal(untouched, h)
