from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steering.refine import Headed, refine
from steering.reward import RewardHead, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.refinement import SETTINGS, columns
from tests.tiny import WIDTH, random_head

CPU = torch.device("cpu")
SLOW = RewardSettings(eta=0.3, iterations=20, direction_scale=1.0)


Counted = Sequence[tuple[RewardHead, int]]
"""Heads, and how many rows each edits."""


def refined_by(h: Tensor, heads: Counted, settings: Sequence[RewardSettings]) -> Tensor:
    """Rows in the order of their heads, each with its own settings."""
    rest = iter(settings)
    with_most = [
        Headed(head, count, max(next(rest).iterations for _ in range(count)))
        for head, count in heads
    ]
    direction_scale, step_sizes = columns(settings)
    return refine(h, with_most, direction_scale, step_sizes, bool(step_sizes.all()))


def expected_of(h: Tensor, heads: Counted, settings: Sequence[RewardSettings]) -> Tensor:
    """Each row by itself, by the slow reference."""
    of_rows = [head for head, count in heads for _ in range(count)]
    rows = zip(h, of_rows, settings, strict=True)
    return torch.stack([oracles.reward(row, head, own) for row, head, own in rows])


@pytest.mark.parametrize("prepared", [False, True])
@given(
    seed=st.integers(0, 10_000),
    units=st.lists(st.sampled_from([7, 24, 25]), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_row_is_refined_by_its_own_head_and_settings(
    prepared: bool, seed: int, units: list[int], data: st.DataObject
) -> None:
    heads: list[tuple[RewardHead, int]] = []
    for place, width in enumerate(units):
        head = random_head(seed + place, units=width)
        count = data.draw(st.integers(1, 6))
        heads.append((head.to(CPU) if prepared else head, count))
    rows = sum(count for _, count in heads)
    settings = data.draw(st.lists(SETTINGS, min_size=rows, max_size=rows))
    h = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    refined = refined_by(h, heads, settings)
    expected = expected_of(h, heads, settings)
    torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (33,), (1, 1, 5), (2, 31)])
def test_many_steps_that_flip_many_units_equal_the_reference(counts: Sequence[int]) -> None:
    """As wide as a real head, whose gradient is kept from step to step."""
    heads = [(random_head(place, 96, 1024).to(CPU), count) for place, count in enumerate(counts)]
    rows = sum(counts)
    h = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    refined = refined_by(h, heads, [SLOW] * rows)
    expected = expected_of(h, heads, [SLOW] * rows)
    w1 = torch.cat([head.w1.expand(count, -1, -1) for head, count in heads])
    b1 = torch.cat([head.b1.expand(count, -1) for head, count in heads])
    before, after = (torch.einsum("rmd,rd->rm", w1, each) + b1 for each in (h, refined))
    assert (((before > 0) != (after > 0)).sum(dim=1) > 20).all()
    # A unit that is zero but for rounding may pass a step earlier or later.
    difference = (refined - expected).norm(dim=1) / (expected - h).norm(dim=1)
    assert (difference < 0.02).all()
    assert difference.median() < 1e-5


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("several", [False, True])
def test_a_rows_bits_do_not_depend_on_the_other_rows(
    prepared: bool, rows: int, several: bool
) -> None:
    head, another = (random_head(seed, width=96, units=256) for seed in (4, 5))
    if prepared:
        head, another = head.to(CPU), another.to(CPU)
    random = torch.Generator().manual_seed(0)
    row = torch.randn(1, 96, generator=random)
    own = RewardSettings(eta=0.5, iterations=4, direction_scale=0.7)
    heads = [(head, 1), (another, rows - 1)] if several else [(head, rows)]
    seen = set()
    for strength, iterations in ((0.0, 1), (0.1, 4), (3.0, 9), (3.0, 64)):
        others = RewardSettings(strength, iterations, direction_scale=strength)
        h = torch.cat((row, torch.randn(rows - 1, 96, generator=random)))
        refined = refined_by(h, heads, [own, *[others] * (rows - 1)])
        seen.add(tuple(refined[0].tolist()))
    assert len(seen) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("units", [24, 250, 255, 256, 1002])
@pytest.mark.parametrize("others", [7, 256, 1500])
def test_a_heads_rows_have_the_same_bits_beside_another_head(
    count: int, units: int, others: int
) -> None:
    """Alone, then beside it, before and after, then compared."""
    head, another = (
        random_head(seed, 96, size).to(CPU) for seed, size in ((1, units), (2, others))
    )
    h = torch.randn(count, 96, generator=torch.Generator().manual_seed(0))
    neighbours = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    few = RewardSettings(eta=0.3, iterations=3, direction_scale=1.0)
    alone = refined_by(h, [(head, count)], [few] * count)
    for most in (0, 3, 5):
        settings = replace(few, iterations=most)
        after = refined_by(
            torch.cat((h, neighbours)),
            [(head, count), (another, 3)],
            [few] * count + [settings] * 3,
        )
        before = refined_by(
            torch.cat((neighbours, h)),
            [(another, 3), (head, count)],
            [settings] * 3 + [few] * count,
        )
        assert torch.equal(after[:count], alone)
        assert torch.equal(before[3:], alone)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_row_that_has_done_its_steps_is_left_alone(prepared: bool) -> None:
    """Even where a step of it would overflow, and where it holds zeros with a sign."""
    head = random_head(1)
    steep = replace(head, w2=torch.full_like(head.w2, 3e38))
    if prepared:
        steep = steep.to(CPU)
    none, one = RewardSettings(0.5, 0, 0.0), RewardSettings(0.5, 1, 0.0)
    h = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    h[0, 0] = -0.0
    refined = refined_by(h, [(steep, 2)], [none, one])
    assert not refined[1].isfinite().all()
    assert torch.equal(refined[0], h[0])
    assert torch.equal(refined[0].signbit(), h[0].signbit())


def test_a_head_too_wide_for_its_gram_matrix_is_refined_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("steering.prepared_head._MOST_UNITS", 64)
    h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    settings = [RewardSettings(0.5, 3, 1.0)] * 5
    narrow, wide = (random_head(1, units=units).to(CPU) for units in (24, 65))
    assert narrow.prepared is not None
    assert wide.prepared is not None
    assert (narrow.prepared.rows.shape[1], wide.prepared.rows.shape[1]) == (WIDTH + 64, WIDTH)
    for heads in ([(narrow, 5)], [(wide, 5)], [(wide, 2), (narrow, 3)]):
        expected = expected_of(h, heads, settings)
        torch.testing.assert_close(refined_by(h, heads, settings), expected)


def test_without_onednn_a_head_is_refined_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    heads = [(random_head(1).to(CPU), 5)]
    assert heads[0][0].prepared is not None
    assert heads[0][0].prepared.packed is None
    settings = [RewardSettings(0.5, 3, 1.0)] * 5
    refined = refined_by(h, heads, settings)
    torch.testing.assert_close(refined, expected_of(h, heads, settings))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_reward_that_is_not_a_number_shows(prepared: bool) -> None:
    """It must not leave the row as it is: that would be the base model, in silence."""
    head = replace(random_head(0), w1=torch.full((24, WIDTH), 3e38))
    head = head.to(CPU) if prepared else head
    h = torch.linspace(0.5, 1, WIDTH)[None]
    assert not reward(head, h).isfinite().all()
    nothing, once = RewardSettings(0.0, 0, 0.0), RewardSettings(0.0, 1, 1.0)
    assert not refined_by(h, [(head, 1)], [once]).isfinite().all()
    assert torch.equal(refined_by(h, [(head, 1)], [nothing]), h)
