"""Tests the kernels that refine rows by reward heads on a GPU against ARGRE's equations.

A row is the last hidden state before `lm_head`. The kernels refine the rows of several heads, kept
in slots, together.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from server.engine.torch.cuda.capture import CudaCapture
from server.engine.torch.cuda.grouped_check import make_grouped_refinement
from steering.grouped_refinement import TILE_ROWS
from steering.reward import RewardHead
from tests.cuda.devices import DEVICE, DRY_RUN, GPU, MARKS, refuse_waits
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
from tests.tiny import random_head

pytestmark = MARKS

# The hidden size of a 7B model; a dry run on a CPU uses smaller sizes.
WIDTH = 4096 if GPU else 32
UNITS = (1024, 256, 1000, 2048) if GPU else (24, 100, 64)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """Return the module of the kernels, which a dry run interprets with large blocks."""
    if DRY_RUN and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton interprets kernels where TRITON_INTERPRET=1 only")
    pytest.importorskip("triton")
    launches = importlib.import_module("steering.kernels.reward_triton")
    with pytest.MonkeyPatch.context() as patch:
        if DRY_RUN:
            use_few_programs(patch, launches)
        yield launches


@pytest.fixture(scope="module")
def heads() -> Sequence[RewardHead]:
    return [random_head(seed, WIDTH, units) for seed, units in enumerate(UNITS)]


def settings_of(count: int, most: int = 6) -> tuple[Tensor, Tensor]:
    scales, sizes = (each.to(DEVICE) for each in mixed_settings(count, most))
    return scales, sizes


def assert_edits_equal(found: Tensor, expected: Tensor, h: Tensor) -> None:
    """Assert that rows got the expected edits, up to units whose activation is nearly zero.

    Rounding decides whether such a unit is on. It moves a row by less than a thirtieth of its
    edit.
    """
    difference = (found - expected).norm(dim=1)
    edit = (expected - h).norm(dim=1)
    assert (difference <= 0.05 * edit + 1e-5 * h.norm(dim=1)).all(), difference / edit
    assert difference.median() <= 1e-5 * h.norm(dim=1).median()


@pytest.mark.parametrize("counts", [(1,), (4, 1), (1, 9, 2), (1, 1, 1, 5), (64,), (40, 30)])
@pytest.mark.parametrize("known", [True, False])
def test_rows_of_several_heads_get_what_the_equations_give(
    kernels: ModuleType, heads: Sequence[RewardHead], counts: Sequence[int], known: bool
) -> None:
    if DRY_RUN and (len(counts) > len(heads) or sum(counts) > 12):
        pytest.skip("too much for the interpreter")
    rows = list(enumerate(counts, 1))
    n = sum(counts)
    refine = filled(heads, kernels, DEVICE)
    h, how = random_rows(n, WIDTH).to(DEVICE), settings_of(n)
    found = refined_by(refine, h, rows, how, known)
    assert_edits_equal(found, expected_of(heads, h, rows, how), h)


def test_a_head_all_of_whose_units_flip_in_each_step(kernels: ModuleType) -> None:
    head = flipping_head(WIDTH, UNITS[0])
    h = random_rows(6, WIDTH).to(DEVICE)
    h[:, 0] = 0.3
    row = torch.arange(6, device=DEVICE)
    sizes = torch.where(torch.arange(5, device=DEVICE) < row[:, None], 1.0, 0.0)
    how = torch.ones(6, 1, device=DEVICE), sizes
    found = refined_by(filled([head], kernels, DEVICE), h, [(1, 6)], how)
    torch.testing.assert_close(found[:, 0], torch.where(row % 2 == 0, 0.3, -0.7))
    assert torch.equal(found[:, 1:], h[:, 1:])


def test_rows_have_the_same_bits_whoever_is_beside_them(
    kernels: ModuleType, heads: Sequence[RewardHead]
) -> None:
    """A row's bits do not depend on the run, the heads' order, its head's other rows, or NaNs."""
    refine = filled(heads, kernels, DEVICE)
    h, how = random_rows(9, WIDTH).to(DEVICE), settings_of(9)
    found = refined_by(refine, h, [(1, 2), (2, 5), (3, 2)], how)
    assert torch.equal(refined_by(refine, h, [(1, 2), (2, 5), (3, 2)], how), found)
    turned = [7, 8, 6, 5, 4, 3, 2, 0, 1]
    others = h[turned]
    others[3] = torch.nan
    again = refined_by(refine, others, [(3, 2), (2, 5), (1, 2)], (how[0][turned], how[1][turned]))
    assert again[3].isnan().all()
    rest = [place for place in range(9) if place != 3]
    assert torch.equal(again[rest], found[turned][rest])
    one = slice(4, 5)
    alone = refined_by(refine, h[one], [(2, 1)], (how[0][one], how[1][one]), known=True)
    assert torch.equal(alone, found[one])


def test_rows_without_a_head_are_left_alone(
    kernels: ModuleType, heads: Sequence[RewardHead]
) -> None:
    """Rows of never filled and of emptied slots keep their bits, NaN and -0.0 included."""
    refine = filled(heads, kernels, DEVICE)
    refine.put(2, None)
    h, how = random_rows(4, WIDTH).to(DEVICE), settings_of(4)
    h[0, :4] = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf])
    slots = torch.tensor([0, 1, 2, 15], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([0, 1, 0, 0], dtype=torch.int32, device=DEVICE)
    found = refine(h, None, slots, counts, *how)
    others = [0, 2, 3]
    assert torch.equal(found[others].view(torch.int32), h[others].view(torch.int32))
    assert not torch.equal(found[1], h[1])


def test_the_host_waits_for_nothing(kernels: ModuleType, heads: Sequence[RewardHead]) -> None:
    """The host does not wait for the GPU to empty and fill slots, nor to refine rows."""
    refine = filled(heads, kernels, DEVICE)
    n = 2 * TILE_ROWS
    batches: Sequence[Rows] = ([(1, n)], [(1, 3), (2, n - 3)])
    steps = [(rows, index_of(rows, DEVICE)) for rows in batches]
    h, how = random_rows(n, WIDTH).to(DEVICE), settings_of(n)
    other = random_head(9, WIDTH, UNITS[1]).to(DEVICE).prepare().prepared
    found = []
    for waits in (True, False):  # kernels are compiled the first time
        refuse_waits(not waits)
        refine.put(3, None)
        refine.put(3, other)
        found = [refine(h, rows, *index, *how) for rows, index in steps]
    refuse_waits(False)
    for each, (rows, _) in zip(found, steps, strict=True):
        assert_edits_equal(each, expected_of(heads, h, rows, how), h)


@pytest.mark.skipif(not GPU, reason="only a GPU has graphs")
def test_a_graph_is_replayed_for_other_rows_heads_and_settings(
    kernels: ModuleType, heads: Sequence[RewardHead]
) -> None:
    """A replay reads the new contents of its buffers, and a slot's new head."""
    refine = filled(heads, kernels, DEVICE)
    n = 9
    batches: Sequence[Rows] = ([(1, n)], [(2, 1), (1, 5), (3, 3)], [(3, 4), (4, 5)], [(2, 9)])
    h = torch.zeros(n, WIDTH, device=DEVICE)
    slots, counts = (each.clone() for each in index_of(batches[0], DEVICE))
    scales, sizes = (torch.zeros_like(each) for each in settings_of(n))
    replay, [refined] = CudaCapture(DEVICE)(lambda: [refine(h, None, slots, counts, scales, sizes)])
    own = list(heads)
    for seed, rows in enumerate(batches):
        if seed == 2:
            own[3] = random_head(77, WIDTH, UNITS[1])
            refine.put(4, own[3].to(DEVICE).prepare().prepared)
        how = tuple(each.roll(seed, 0) for each in settings_of(n))
        content = (random_rows(n, WIDTH, seed).to(DEVICE), *index_of(rows, DEVICE), *how)
        for buffer, each in zip((h, slots, counts, scales, sizes), content, strict=True):
            buffer.copy_(each)
        replay()
        assert_edits_equal(refined, expected_of(own, h, rows, (scales, sizes)), h)


def test_the_check_at_start_lets_the_kernels_through(kernels: ModuleType) -> None:
    assert make_grouped_refinement(4, WIDTH, DEVICE, UNITS[:2]) is not None
