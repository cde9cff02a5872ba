"""Tests rows refined by ARGRE's equations and by prepared heads against a slow reference.

A row is the last hidden state before `lm_head`. A prepared head has its W1 W1^T, with which the
hidden units are updated at each step without a product by W1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steering.reward import RewardHead, refine, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.refinement import SETTINGS, columns
from tests.tiny import WIDTH, random_head

FEW = RewardSettings(eta=0.3, iterations=3, direction_scale=1.0)
SLOW = RewardSettings(eta=0.3, iterations=20, direction_scale=1.0)


Counted = Sequence[tuple[RewardHead, int]]
"""Pairs of a head and the number of rows that it edits."""


@pytest.fixture(scope="module", params=["plain", "prepared", "one thread", "7 threads"])
def is_prepared(request: pytest.FixtureRequest) -> Iterator[bool]:
    threads = torch.get_num_threads()
    if "thread" in request.param:
        torch.set_num_threads(7 if request.param == "7 threads" else 1)
    yield request.param != "plain"
    torch.set_num_threads(threads)


def refined_by(
    h: Tensor, heads: Counted, settings: Sequence[RewardSettings], is_prepared: bool
) -> Tensor:
    """Refine rows, each with its own settings; `h` has the rows of the first head first."""
    refined = []
    first = 0
    for head, count in heads:
        own = slice(first, first + count)
        first = own.stop
        used = head.prepare() if is_prepared else head
        refined.append(refine(h[own], used, *columns(settings[own])))
    return torch.cat(refined)


def expected_of(h: Tensor, heads: Counted, settings: Sequence[RewardSettings]) -> Tensor:
    """Return the rows, each refined by itself by the slow reference."""
    of_rows = [head for head, count in heads for _ in range(count)]
    rows = zip(h, of_rows, settings, strict=True)
    return torch.stack([oracles.reward(row, head, own) for row, head, own in rows])


def random_rows(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 15, 16, WIDTH]),
    units=st.lists(st.sampled_from([1, 7, 64, 65]), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_row_is_refined_by_its_own_head_and_settings(
    is_prepared: bool, seed: int, width: int, units: list[int], data: st.DataObject
) -> None:
    heads = [
        (random_head(seed + place, width, each), data.draw(st.integers(1, 6)))
        for place, each in enumerate(units)
    ]
    rows = sum(count for _, count in heads)
    settings = data.draw(st.lists(SETTINGS, min_size=rows, max_size=rows))
    h = random_rows(rows, width, seed)
    refined = refined_by(h, heads, settings, is_prepared)
    expected = expected_of(h, heads, settings)
    torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (33,), (1, 1, 5), (2, 31), (70, 1)])
def test_many_steps_that_flip_many_units_equal_the_reference(
    is_prepared: bool, counts: Sequence[int]
) -> None:
    """The head has as many hidden units as ARGRE's, so that many of them flip."""
    heads = [(random_head(place, 96, 1024), count) for place, count in enumerate(counts)]
    rows = sum(counts)
    h = random_rows(rows, 96)
    refined = refined_by(h, heads, [SLOW] * rows, is_prepared)
    expected = expected_of(h, heads, [SLOW] * rows)
    w1 = torch.cat([head.w1.expand(count, -1, -1) for head, count in heads])
    b1 = torch.cat([head.b1.expand(count, -1) for head, count in heads])
    before, after = (torch.einsum("rmd,rd->rm", w1, each) + b1 for each in (h, refined))
    assert (((before > 0) != (after > 0)).sum(dim=1) > 20).all()
    # A unit whose activation is nearly zero may flip one step earlier or later by rounding.
    difference = (refined - expected).norm(dim=1) / (expected - h).norm(dim=1)
    assert (difference < 0.02).all()
    assert difference.median() < 1e-5


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("several", [False, True])
def test_a_rows_bits_do_not_depend_on_the_other_rows(
    is_prepared: bool, rows: int, several: bool
) -> None:
    head, another = (random_head(seed, width=96, units=256) for seed in (4, 5))
    row = random_rows(1, 96)
    own = RewardSettings(eta=0.5, iterations=4, direction_scale=0.7)
    heads = [(head, 1), (another, rows - 1)] if several else [(head, rows)]
    seen = set()
    for strength, iterations in ((0.0, 1), (0.1, 4), (3.0, 9), (3.0, 64)):
        others = RewardSettings(strength, iterations, direction_scale=strength)
        h = torch.cat((row, random_rows(rows - 1, 96, iterations)))
        refined = refined_by(h, heads, [own, *[others] * (rows - 1)], is_prepared)
        seen.add(tuple(refined[0].tolist()))
    assert len(seen) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("units", [24, 250, 256, 1002])
@pytest.mark.parametrize("others", [7, 256, 1500])
def test_a_heads_rows_have_the_same_bits_beside_another_head(
    is_prepared: bool, count: int, units: int, others: int
) -> None:
    """The head's rows come before or after the other head's, which takes fewer or more steps."""
    head, another = (random_head(seed, 96, size) for seed, size in ((1, units), (2, others)))
    h, neighbours = random_rows(count, 96), random_rows(3, 96, 1)
    alone = refined_by(h, [(head, count)], [FEW] * count, is_prepared)
    for most in (0, 3, 5):
        settings = replace(FEW, iterations=most)
        after = refined_by(
            torch.cat((h, neighbours)),
            [(head, count), (another, 3)],
            [FEW] * count + [settings] * 3,
            is_prepared,
        )
        before = refined_by(
            torch.cat((neighbours, h)),
            [(another, 3), (head, count)],
            [settings] * 3 + [FEW] * count,
            is_prepared,
        )
        assert torch.equal(after[:count], alone)
        assert torch.equal(before[3:], alone)


def test_a_row_that_has_done_its_steps_is_left_alone(is_prepared: bool) -> None:
    """A row without steps left keeps its bits, even if another step would overflow."""
    head = random_head(1)
    steep = replace(head, w2=torch.full_like(head.w2, 3e38))
    none, one = RewardSettings(0.5, 0, 0.0), RewardSettings(0.5, 1, 0.0)
    h = random_rows(2)
    h[0, 0] = -0.0
    refined = refined_by(h, [(steep, 2)], [none, one], is_prepared)
    assert not refined[1].isfinite().all()
    assert torch.equal(refined[0], h[0])
    assert torch.equal(refined[0].signbit(), h[0].signbit())


def test_a_head_too_wide_to_be_prepared_is_refined_as_well(
    is_prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.prepared_head._MAX_UNITS", 64)
    h = random_rows(5)
    narrow, wide = (random_head(1, units=units) for units in (24, 65))
    assert narrow.prepare().prepared is not None
    assert wide.prepare().prepared is None
    settings = [replace(FEW, iterations=iterations) for iterations in (4, 1, 3, 2, 0)]
    for heads in ([(narrow, 5)], [(wide, 5)], [(wide, 2), (narrow, 3)], [(narrow, 2), (wide, 3)]):
        expected = expected_of(h, heads, settings)
        torch.testing.assert_close(refined_by(h, heads, settings, is_prepared), expected)


def test_weights_whose_products_overflow_are_refined_by_the_equations(
    is_prepared: bool,
) -> None:
    usual = random_head(1)
    large = replace(usual, w1=usual.w1 * 1e20, b1=usual.b1 * 1e20, w2=usual.w2 * 1e-20)
    assert large.prepare().prepared is None
    h = random_rows(2)
    expected = expected_of(h, [(large, 2)], [FEW] * 2)
    assert expected.isfinite().all()
    torch.testing.assert_close(refined_by(h, [(large, 2)], [FEW] * 2, is_prepared), expected)


def test_a_reward_that_is_not_a_number_shows(is_prepared: bool) -> None:
    """A NaN reward must not leave a row unedited, which would silently be the base model's row."""
    w2 = torch.tensor([3e38, -3e38]).repeat(12)
    head = replace(random_head(0), w1=torch.ones(24, WIDTH), w2=w2)
    assert head.prepare().prepared is not None
    h = torch.linspace(0.5, 1, WIDTH)[None]
    assert reward(head, h).isnan().all()
    nothing, once = RewardSettings(0.0, 0, 0.0), RewardSettings(0.0, 1, 1.0)
    assert not refined_by(h, [(head, 1)], [once], is_prepared).isfinite().all()
    assert torch.equal(refined_by(h, [(head, 1)], [nothing], is_prepared), h)


def test_a_unit_that_is_not_a_number_shows(is_prepared: bool) -> None:
    """A NaN hidden unit must give a NaN row; dropping it would give a wrong but finite reward."""
    head = random_head(0)
    head.w1[3] = torch.zeros(WIDTH)
    head.w1[3, :2] = torch.tensor([1.2e19, -1.2e19])
    assert head.prepare().prepared is not None
    h = random_rows(1)
    h[0, :2] = 3e19
    assert (h @ head.w1.T)[0, 3].isnan()
    assert refined_by(h, [(head, 1)], [FEW], is_prepared).isnan().all()


def test_a_unit_at_minus_infinity_is_off(is_prepared: bool) -> None:
    head = random_head(0)
    head.w1[3] = torch.zeros(WIDTH)
    head.w1[3, 0] = -1.8e19  # its square is finite, so the head can be prepared
    assert head.prepare().prepared is not None
    h = random_rows(1)
    h[0, 0] = 2e19
    assert (h @ head.w1.T)[0, 3] == -torch.inf
    expected = expected_of(h, [(head, 1)], [FEW])
    assert expected.isfinite().all()
    torch.testing.assert_close(refined_by(h, [(head, 1)], [FEW], is_prepared), expected)


@pytest.mark.parametrize("width", [96, 100])
def test_rows_are_given_back_and_not_changed(is_prepared: bool, width: int) -> None:
    """Rows may be contiguous or strided; the input stays unchanged."""
    for h in (random_rows(3, width), random_rows(width, 3).T):
        before = h.clone()
        refined = refined_by(h, [(random_head(1, width), 3)], [FEW] * 3, is_prepared)
        assert torch.equal(h, before)
        expected = expected_of(h, [(random_head(1, width), 3)], [FEW] * 3)
        torch.testing.assert_close(refined, expected)
