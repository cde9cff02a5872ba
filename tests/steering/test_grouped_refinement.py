"""Tests the kernels that refine rows of many heads, interpreted on the CPU, against references.

A row is the last hidden state before `lm_head`. Reward heads are kept in slots. A tile is a few
rows of one head that the kernels process together.
Their tests on a GPU are in `tests/cuda`.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering.grouped_refinement import TILE_ROWS, GroupedRefinement, tiles
from steering.reward import RewardHead, reward
from steering.settings import RewardSettings
from tests import oracles
from tests.grouped import (
    Rows,
    expected_of,
    filled,
    flipping_head,
    index_of,
    mixed_settings,
    random_rows,
    refined_by,
    use_few_programs,
)
from tests.refinement import SETTINGS, columns
from tests.tiny import random_head

pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
# Triton's interpreter computes with NumPy, which warns about infinities and NaNs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("they are compiled here, and not interpreted")
    return importlib.import_module("steering.kernels.reward_triton")


@pytest.fixture(scope="module")
def large(kernels: ModuleType) -> Iterator[ModuleType]:
    """Return the module of the kernels with large blocks, which are interpreted faster."""
    with pytest.MonkeyPatch.context() as patch:
        use_few_programs(patch, kernels)
        yield kernels


def oracle(
    heads: Sequence[RewardHead], h: Tensor, rows: Rows, how: Sequence[RewardSettings]
) -> Tensor:
    """Return the rows, each refined by itself by the slow reference."""
    of_rows = [heads[slot - 1] for slot, count in rows for _ in range(count)]
    each = zip(h, of_rows, how, strict=True)
    return torch.stack([oracles.reward(row, head, own) for row, head, own in each])


@given(rows=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), max_size=6))
def test_tiles_divide_the_rows_of_each_head(rows: list[tuple[int, int]]) -> None:
    slots, counts = tiles(rows)
    assert slots == [slot for slot, count in rows for _ in range(count)]
    begins = [place for place, count in enumerate(counts) if count]
    # Tiles cover all rows without gaps, and none contains rows of two heads.
    assert [place + counts[place] for place in begins] == [
        *begins[1:],
        *([len(slots)] * bool(begins)),
    ]
    ends = {sum(count for _, count in rows[:place]) for place in range(len(rows))}
    assert ends <= {*begins}
    assert all(count <= TILE_ROWS for count in counts)
    assert len(begins) == sum(-(-count // TILE_ROWS) for _, count in rows)


@pytest.mark.parametrize(
    ("width", "units", "counts"),
    [
        (32, (24,), (1,)),
        (36, (24, 40, 100), (1, 4, 5)),
        (100, (1000, 40, 100), (1, 9, 2)),
    ],
)
def test_each_row_is_refined_by_its_own_head_and_settings(
    large: ModuleType, width: int, units: Sequence[int], counts: Sequence[int]
) -> None:
    heads = [random_head(seed, width, each) for seed, each in enumerate(units)]
    rows = list(enumerate(counts, 1))
    n = sum(counts)
    h = random_rows(n, width)
    how = [RewardSettings(0.1 * (row % 5), row % 7, 0.4 * (row % 3)) for row in range(4, 4 + n)]
    refine = filled(heads, large, CPU)
    expected = oracle(heads, h, rows, how)
    before = h.clone()
    found = refined_by(refine, h, rows, columns(how))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(h, before)


def test_blocks_as_small_as_on_a_gpu_give_the_same(kernels: ModuleType) -> None:
    heads = [random_head(0, 260, 100), random_head(1, 260, 24)]
    h, rows, how = random_rows(3, 260), [(2, 1), (1, 2)], mixed_settings(3)
    found = refined_by(filled(heads, kernels, CPU), h, rows, how)
    torch.testing.assert_close(found, expected_of(heads, h, rows, how), rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([1, 15, 32]),
    how=st.lists(SETTINGS, min_size=2, max_size=6),
)
def test_settings_of_rows_differ(
    large: ModuleType, seed: int, width: int, how: list[RewardSettings]
) -> None:
    heads = [random_head(seed, width), random_head(seed + 1, width, 65)]
    rows = [(1, 1), (2, len(how) - 1)]
    h = random_rows(len(how), width, seed)
    found = refined_by(filled(heads, large, CPU), h, rows, columns(how))
    torch.testing.assert_close(found, oracle(heads, h, rows, how), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [0, 4])
def test_rows_of_one_head_are_the_same_by_torch_and_by_kernels(
    large: ModuleType, most: int
) -> None:
    head = random_head(1, 36, 100)
    h, how = random_rows(9, 36), mixed_settings(9, most)
    refine = filled([head], large, CPU)
    grouped = refined_by(refine, h, [(1, 9)], how)
    known = refined_by(refine, h, [(1, 9)], how, known=True)
    assert not torch.equal(known, grouped), "they should not be computed in one way"
    torch.testing.assert_close(known, grouped, rtol=1e-5, atol=1e-5)
    few = how[0][:TILE_ROWS], how[1][:TILE_ROWS]
    alike = refined_by(refine, h[:TILE_ROWS], [(1, TILE_ROWS)], few, known=True)
    assert torch.equal(alike, grouped[:TILE_ROWS])


@pytest.mark.parametrize("known", [True, False])
def test_a_head_all_of_whose_units_flip_in_each_step(large: ModuleType, known: bool) -> None:
    head = flipping_head(32, 200)
    h = random_rows(6, 32)
    h[:, 0] = 0.3
    steps = torch.arange(5)
    how = torch.ones(6, 1), torch.where(steps < torch.arange(6)[:, None], 1.0, 0.0)
    found = refined_by(filled([head], large, CPU), h, [(1, 6)], how, known)
    expected = torch.where(torch.arange(6) % 2 == 0, 0.3, -0.7)
    torch.testing.assert_close(found[:, 0], expected)
    assert torch.equal(found[:, 1:], h[:, 1:])


def test_heads_in_another_order_give_the_same_rows(large: ModuleType) -> None:
    """A row's bits do not depend on the heads' order, nor on the number of its head's rows."""
    heads = [random_head(seed, 36, units) for seed, units in enumerate((24, 100, 40))]
    h, how = random_rows(9, 36), mixed_settings(9)
    refine = filled(heads, large, CPU)
    found = refined_by(refine, h, [(1, 2), (2, 5), (3, 2)], how)

    def in_order(places: Sequence[int], rows: Rows) -> Tensor:
        taken = torch.tensor(places)
        return refined_by(refine, h[taken], rows, (how[0][taken], how[1][taken]))

    turned = [7, 8, 6, 5, 4, 3, 2, 0, 1]
    assert torch.equal(in_order(turned, [(3, 2), (2, 5), (1, 2)]), found[turned])
    for place, slot in ((0, 1), (4, 2), (8, 3)):
        assert torch.equal(in_order([place], [(slot, 1)])[0], found[place])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_rows_stay_nonfinite_and_spare_others(
    large: ModuleType, known: bool, bad: float
) -> None:
    head = random_head(1, 32)
    h = random_rows(6, 32)
    how = torch.ones(6, 1), torch.full((6, 3), 0.3)
    refine = filled([head], large, CPU)
    usual = refined_by(refine, h, [(1, 6)], how, known)
    h[1, 5] = bad
    found = refined_by(refine, h, [(1, 6)], how, known)
    assert not found[1].isfinite().all()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(found[others], usual[others], rtol=0, atol=1e-6 * known)


@pytest.mark.parametrize("known", [True, False])
def test_a_reward_that_is_not_a_number_shows(large: ModuleType, known: bool) -> None:
    """A NaN reward must not leave a row unedited, which would silently be the base model's row."""
    w2 = torch.tensor([3e38, -3e38]).repeat(12)
    head = replace(random_head(0), w1=torch.ones(24, 32), w2=w2)
    h = torch.linspace(0.5, 1, 32).repeat(5, 1)
    assert reward(head, h).isnan().all()
    refine = filled([head], large, CPU)
    once = torch.ones(5, 1), torch.zeros(5, 1)
    assert refined_by(refine, h, [(1, 5)], once, known).isnan().all()
    nothing = torch.zeros(5, 1), torch.zeros(5, 0)
    assert torch.equal(refined_by(refine, h, [(1, 5)], nothing, known), h)


def test_a_unit_that_is_not_a_number_shows(large: ModuleType) -> None:
    """A NaN hidden unit must give a NaN row; dropping it would give a wrong but finite reward."""
    head = random_head(0)
    head.w1[3] = torch.zeros(32)
    head.w1[3, :2] = torch.tensor([1.2e19, -1.2e19])
    h = random_rows(1, 32)
    h[0, :2] = 3e19
    how = torch.ones(1, 1), torch.zeros(1, 0)
    assert refined_by(filled([head], large, CPU), h, [(1, 1)], how).isnan().all()


@pytest.mark.parametrize("known", [True, False])
def test_a_unit_at_minus_infinity_is_off(large: ModuleType, known: bool) -> None:
    head = random_head(0)
    head.w1[3] = torch.zeros(32)
    head.w1[3, 0] = -1.8e19  # its square is finite, so the head can be prepared
    h, how = random_rows(5, 32), mixed_settings(5)
    h[:, 0] = 2e19
    assert ((h @ head.w1.T)[:, 3] == -torch.inf).all()
    found = refined_by(filled([head], large, CPU), h, [(1, 5)], how, known)
    torch.testing.assert_close(found, expected_of([head], h, [(1, 5)], how))


@pytest.mark.parametrize("known", [True, False])
def test_a_row_that_has_done_its_steps_is_left_alone(large: ModuleType, known: bool) -> None:
    """A row without steps left keeps its bits, even if another step would overflow."""
    usual = random_head(1)
    head = replace(usual, w2=torch.full_like(usual.w2, 3e38))
    h = random_rows(5, 32)
    h[0, 0] = -0.0
    sizes = torch.zeros(5, 2)
    sizes[1, 0] = 5.0
    found = refined_by(filled([head], large, CPU), h, [(1, 5)], (torch.zeros(5, 1), sizes), known)
    assert not found[1].isfinite().all()
    others = [0, 2, 3, 4]
    assert torch.equal(found[others].view(torch.int32), h[others].view(torch.int32))


def test_rows_without_a_head_are_left_alone(large: ModuleType) -> None:
    """Rows of never filled and of emptied slots keep their bits, NaN and -0.0 included."""
    heads = [random_head(1), random_head(2)]
    refine = filled(heads, large, CPU)
    refine.put(2, None)
    h, how = random_rows(6, 32), mixed_settings(6)
    h[0, :4] = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf])
    slots = torch.tensor([0, 1, 1, 2, 15, 0], dtype=torch.int32)
    counts = torch.tensor([0, 2, 0, 0, 0, 0], dtype=torch.int32)
    found = refine(h, None, slots, counts, *how)
    others = [0, 3, 4, 5]
    assert torch.equal(found[others].view(torch.int32), h[others].view(torch.int32))
    own = slice(1, 3)
    expected = expected_of(heads, h[own], [(1, 2)], (how[0][own], how[1][own]))
    torch.testing.assert_close(found[own], expected)


def test_slots_are_filled_and_emptied(large: ModuleType) -> None:
    refine = GroupedRefinement(4, CPU, large)
    assert not refine.has_heads([1])
    assert refine.max_units == 64
    h, rows, how = random_rows(2, 32), [(2, 2)], mixed_settings(2)
    for seed, units, most in ((0, 24, 64), (1, 100, 128), (2, 40, 128), (3, 250, 256)):
        head = random_head(seed, 32, units)
        refine.put(2, head.prepare().prepared)
        assert refine.max_units == most
        assert refine.has_heads([2, 2])
        assert not refine.has_heads([1, 2])
        # Slot 2's head is `heads[1]`; no row uses `heads[0]`.
        expected = expected_of([head, head], h, rows, how)
        torch.testing.assert_close(refined_by(refine, h, rows, how), expected)
    refine.put(2, None)
    assert not refine.has_heads([2])
    assert refine.has_heads([])
    assert torch.equal(refined_by(refine, h, rows, how), h)


@pytest.mark.parametrize("known", [True, False])
def test_rows_are_read_however_they_lie_in_memory(large: ModuleType, known: bool) -> None:
    head, rows, how = random_head(1), [(1, 5)], mixed_settings(5)
    h = random_rows(32, 5).T
    found = refined_by(filled([head], large, CPU), h, rows, how, known)
    torch.testing.assert_close(found, expected_of([head], h, rows, how))


def test_contents_of_the_index_may_change_where_its_shapes_and_addresses_do_not(
    large: ModuleType,
) -> None:
    """A CUDA graph needs this: slots, tiles and settings must be read when the kernels run."""
    heads = [random_head(1), random_head(2, 32, 100)]
    refine = filled(heads, large, CPU)
    slots, counts = index_of([(1, 5)], CPU)
    scales, sizes = (torch.empty_like(each) for each in mixed_settings(5))
    for seed, rows in enumerate(([(1, 5)], [(2, 1), (1, 4)], [(2, 3), (1, 2)])):
        for buffer, content in zip((slots, counts), index_of(rows, CPU), strict=True):
            buffer.copy_(content)
        for buffer, content in zip((scales, sizes), mixed_settings(5), strict=True):
            buffer.copy_(content.roll(seed, 0))
        h = random_rows(5, 32, seed)
        found = refine(h, None, slots, counts, scales, sizes)
        torch.testing.assert_close(found, expected_of(heads, h, rows, (scales, sizes)))
