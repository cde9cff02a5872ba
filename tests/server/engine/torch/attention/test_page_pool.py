"""Tests the pool of pages, which hold 64 tokens each, and lanes: the pages of one sequence."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.torch.attention.page_pool import (
    PAGE,
    SCRATCH,
    OutOfPagesError,
    PagedLane,
    PagePool,
)
from server.engine.torch.attention.slab import KVShape

CPU = torch.device("cpu")
SHAPE = KVShape(2, 8, torch.float32, (CPU, CPU))


def lane_of(pool: PagePool, tokens: int) -> PagedLane:
    lane = PagedLane(pool)
    lane.reserve(tokens)
    return lane


def numbered(start: int, end: int) -> list[torch.Tensor]:
    """Return keys and values, in a lane's layout, whose numbers are their tokens' positions."""
    tokens = torch.arange(start, end, dtype=torch.float32)
    return [tokens[None, None, :, None, None].expand(2, 2, -1, 2, 8)]


def test_a_lane_takes_a_page_for_each_64_tokens_and_gives_all_back() -> None:
    pool = PagePool(SHAPE, 5)
    lane = lane_of(pool, 1)
    assert (lane.capacity, len(pool._free)) == (PAGE, 3)
    lane.reserve(PAGE + 1)
    assert (lane.capacity, len(pool._free)) == (2 * PAGE, 2)
    assert SCRATCH not in lane.pages
    pool.check([lane])
    lane.free()
    lane.free()
    assert (lane.capacity, len(pool._free)) == (0, 4)
    pool.check([lane])


def test_pages_that_are_lost_are_noticed() -> None:
    pool = PagePool(SHAPE, 3)
    lane_of(pool, 1)
    with pytest.raises(AssertionError, match="lost"):
        pool.check([])


def test_reserving_too_many_pages_raises() -> None:
    pool = PagePool(SHAPE, 3)
    lane = lane_of(pool, PAGE)
    with pytest.raises(OutOfPagesError, match="3 pages"):
        lane.reserve(3 * PAGE)
    pool.check([lane])
    lane.free()
    assert len(pool._free) == 2


def test_layers_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device"):
        PagePool(KVShape(2, 8, torch.float32, (CPU, torch.device("meta"))), 2)


@pytest.mark.parametrize(("start", "end"), [(0, 16), (60, 70), (64, 128), (100, 700), (511, 512)])
def test_what_is_read_can_be_written_elsewhere(start: int, end: int) -> None:
    pool = PagePool(SHAPE, 40)
    for page in range(40):
        pool.page(page).zero_()
    source, copy = lane_of(pool, 1), lane_of(pool, 1)
    source.write(0, numbered(0, 700))
    read = source.read(start, end)
    source.write(0, numbered(1000, 1700))
    copy.write(start, read)
    [found] = copy.read(start, end)
    assert torch.equal(found, numbered(start, end)[0])
    assert found.shape == (2, 2, end - start, 2, 8)
    if start:
        assert not copy.read(0, start)[0].any()


def test_a_layer_shows_what_is_stored_where_the_table_says() -> None:
    pool = PagePool(SHAPE, 40)
    lane_of(pool, 1)
    lane = lane_of(pool, 1)
    lane.write(0, numbered(0, 300))
    keys, values = pool.layer(1)
    page = int(pool.tables[lane.row, 299 // PAGE])
    assert keys[page, 299 % PAGE].eq(299).all()
    assert values[page, 299 % PAGE].eq(299).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 1200)), max_size=60))
def test_lanes_keep_what_they_hold_whoever_comes_grows_and_goes(
    steps: Sequence[tuple[int, int]],
) -> None:
    pool = PagePool(KVShape(1, 1, torch.float32, (CPU,)), 800)
    lanes: dict[int, PagedLane] = {}
    for name, tokens in steps:
        if name in lanes and tokens % 3 == 0:
            lanes.pop(name).free()
        else:
            lane = lanes.setdefault(name, PagedLane(pool))
            lane.reserve(tokens)
            lane.write(lane.capacity - 1, [torch.full((1, 2, 1, 1, 1), float(name))])
        pool.check(lanes.values())
        for name_of, lane in lanes.items():
            [last] = lane.read(lane.capacity - 1, lane.capacity)
            assert last.eq(name_of).all()
