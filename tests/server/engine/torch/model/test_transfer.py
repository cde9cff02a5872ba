"""Tests of the upload of a step: all its tensors travel to the device in one staging buffer."""

import torch

from server.engine.torch.attention.paged_index import PagedIndex
from server.engine.torch.attention.staging import (
    index_to_device,
)
from server.engine.torch.model.transfer import Layout, to_device
from steering.route import Span, build_route
from steering.settings import AffineSettings, RewardSettings, SlottedEdit

CPU = torch.device("cpu")
TENSORS = [
    torch.arange(5)[None],
    torch.tensor([1, 2, 3], dtype=torch.int32),
    torch.empty(0, dtype=torch.int64),
    torch.tensor([[0.5], [0.25]]),
    torch.empty(0, 4, 1),
    torch.tensor(7),
]


def test_tensors_of_all_kinds_come_as_they_were() -> None:
    for before, after in zip(TENSORS, to_device(TENSORS, CPU), strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert torch.equal(after, before)


def test_what_is_staged_is_a_copy() -> None:
    source = torch.arange(4)
    [staged] = to_device([source], CPU)
    source.zero_()
    assert staged.tolist() == [0, 1, 2, 3]


def test_views_lie_apart_and_aligned() -> None:
    layout = Layout.of(TENSORS)
    assert all(start % 16 == 0 for start in layout.starts)
    views = layout.views(torch.zeros(layout.size, dtype=torch.uint8))
    for number, view in enumerate(views):
        view.fill_(number)
    assert all(view.eq(number).all() for number, view in enumerate(views))


def test_an_index_keeps_what_is_known_on_the_host() -> None:
    one, two, three, four = (torch.tensor([each], dtype=torch.int32) for each in range(4))
    index = PagedIndex(
        slots=torch.tensor([5, 6]),
        query_ends=one,
        lengths=two,
        tables=torch.ones(2, 3, dtype=torch.int32),
        block_spans=three,
        block_starts=four,
        block_rows=16,
        splits=2,
        max_keys=4,
    )
    moved = index_to_device(index, CPU)
    assert (moved.block_rows, moved.splits, moved.max_keys) == (16, 2, 4)
    for name in ("slots", "query_ends", "lengths", "tables", "block_spans", "block_starts"):
        before, after = getattr(index, name), getattr(moved, name)
        assert torch.equal(before, after), name
        assert after.dtype == before.dtype, name


def test_a_route_keeps_its_places() -> None:
    edits = (
        SlottedEdit(3, AffineSettings(0.5)),
        SlottedEdit(2, RewardSettings(0.3, 4, 0.5)),
        SlottedEdit(1, AffineSettings(0.25)),
    )
    spans = [Span(0, 2, 2, range(1), edits), Span(0, 1, 1, range(1, 2), edits[1:])]
    route = build_route(spans, CPU)
    moved = route.with_tensors(to_device(route.tensors(), CPU), CPU)
    assert moved.affine is not None
    assert route.affine is not None
    assert (moved.affine.indices, moved.affine.used_slots) == ((0, 1), frozenset({1, 3}))
    assert [(layer.heads, layer.step_sizes.shape) for layer in moved.reward] == [
        (((2, 2, 4),), (2, 4))
    ]
    for before, after in zip(route.tensors(), moved.tensors(), strict=True):
        assert torch.equal(before, after)
