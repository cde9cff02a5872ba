"""Tests attention over pages against attention over slabs, which has tests of its own.

A page holds 64 tokens' keys and values, and a sequence has a table of pages. A slab holds all of
one sequence's keys and values contiguously. A lane is either kind of memory of one sequence.
"""

import pytest
import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams, LaneSpan
from server.engine.torch.attention.page_pool import PAGE, PagedLane
from server.engine.torch.attention.paged_attention import PagedMemory, PagedStep
from server.engine.torch.attention.paged_index import Tiling
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.attention.staging import index_to_device
from tests.paged import paged_reference

HEADS, KV_HEADS, WIDTH = 6, 2, 8
CPU = torch.device("cpu")
SHAPE = KVShape(KV_HEADS, WIDTH, torch.float32, (CPU, CPU))
TILING = Tiling(HEADS, KV_HEADS, 4, processors=8)


def expected(texts: list[list[Tensor]], window: int | None) -> list[Tensor]:
    """Return each sequence's attention over slabs, (tokens, heads, width), one call each."""
    outputs = []
    for query, key, value in texts:
        memory = SlabMemory(SHAPE)
        lane = memory.lane()
        lane.reserve(query.shape[1])
        step = memory.step([LaneSpan(lane, 0, query.shape[1])])
        params = AttentionParams(0.5, window, None)
        outputs.append(step.attend(1, query[None], key[None], value[None], params)[0])
    return outputs


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize(
    "chunks", [(600,), (PAGE, 1, PAGE - 1, 600), (PAGE - 1, 2, 600), (30, 500, 1, 69)], ids=str
)
def test_sequences_of_unequal_lengths_in_chunks_equal_those_on_a_cpu(
    chunks: tuple[int, ...], window: int | None
) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = (600, 1, PAGE, PAGE + 1, 300)
    texts = [
        [
            torch.randn(heads, length, WIDTH, generator=random)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        for length in lengths
    ]
    memory = PagedMemory(SHAPE, 40, TILING, paged_reference)
    lanes = [memory.lane() for _ in lengths]
    done = [0] * len(lengths)
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    for chunk in chunks:
        spans, owners = [], []
        for owner, length in enumerate(lengths):
            if count := min(chunk, length - done[owner]):
                lanes[owner].reserve(done[owner] + count)
                spans.append(LaneSpan(lanes[owner], done[owner], count))
                owners.append(owner)
                done[owner] += count
        query, key, value = (
            torch.cat(
                [
                    texts[owner][part][:, span.start : span.start + span.count]
                    for owner, span in zip(owners, spans, strict=True)
                ],
                dim=1,
            )[None]
            for part in range(3)
        )
        output = memory.step(spans).attend(1, query, key, value, AttentionParams(0.5, window, None))
        assert output.shape == (1, query.shape[2], HEADS, WIDTH)
        parts = torch.split(output[0], [span.count for span in spans])
        for owner, part in zip(owners, parts, strict=True):
            outputs[owner].append(part)
    memory.check(lanes)
    assert done == list(lengths)
    for one, other in zip(outputs, expected(texts, window), strict=True):
        torch.testing.assert_close(torch.cat(one), other, rtol=1e-5, atol=1e-5)


def test_another_layer_keeps_its_own() -> None:
    memory = PagedMemory(SHAPE, 3, TILING, paged_reference)
    memory.pool.layer(0)[0].zero_()
    lane = memory.lane()
    lane.reserve(1)
    token = torch.ones(1, KV_HEADS, 1, WIDTH)
    memory.step([LaneSpan(lane, 0, 1)]).attend(
        1, token, token, 2 * token, AttentionParams(None, None, None)
    )
    assert not memory.pool.layer(0)[0].any()
    keys, values = memory.pool.layer(1)
    assert keys[lane.pages[0], 0].eq(1).all()
    assert values[lane.pages[0], 0].eq(2).all()


def test_a_step_that_is_moved_tells_the_windows_that_were_asked_for() -> None:
    memory = PagedMemory(SHAPE, 3, TILING, paged_reference)
    lane = memory.lane()
    lane.reserve(1)
    step = memory.step([LaneSpan(lane, 0, 1)])
    assert isinstance(step, PagedStep)
    token = torch.ones(1, KV_HEADS, 1, WIDTH)
    moved = step.moved(index_to_device(step.index, CPU))
    moved.attend(0, token, token, token, AttentionParams(None, 3, None))
    assert step.windows == {3}


def test_a_lane_of_another_memory_is_noticed() -> None:
    memory = PagedMemory(SHAPE, 3, TILING, paged_reference)
    with pytest.raises(AssertionError, match="another memory"):
        memory.step([LaneSpan(SlabMemory(SHAPE).lane(), 0, 1)])
    with pytest.raises(AssertionError, match="another memory"):
        SlabMemory(SHAPE).order(LaneSpan(PagedLane(memory.pool), 0, 1))
