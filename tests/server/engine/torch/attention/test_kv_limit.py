"""Tests that KV memory never exceeds its limit, and that freed memory is given back.

A slab holds one sequence's keys and values contiguously; slabs of one capacity form a group.
The scheduler, the KV store, the prefix cache and the slabs are real; no model computes the keys.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.output import StepOutput
from server.engine.request import Request, SamplingSettings
from server.engine.torch.attention.mapped import (
    _SLOTS_A_CHUNK,
    PAGE_BYTES,
    Mapping,
    TensorPool,
    whole_pages,
)
from server.engine.torch.attention.plan import KVOptions, plan_slabs
from server.engine.torch.attention.slab import KVShape, Slab, SlabGroup, SlabPool
from server.engine.torch.attention.slab_attention import SlabMemory
from server.engine.torch.kv_store import KVStore
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Scheduler
from server.engine.torch.scheduling.sequence import Sequence

CPU = torch.device("cpu")
# Heads of 128, 160 and 512 bytes per token: 160 does not divide a page.
SHAPES = [
    KVShape(2, 64, torch.bfloat16, [CPU] * 3),
    KVShape(1, 80, torch.bfloat16, [CPU] * 3),
    KVShape(2, 128, torch.float32, [CPU] * 2),
]
ids = [f"{shape.head_bytes} bytes a head" for shape in SHAPES]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def bytes_of_copies(copies: TensorPool) -> int:
    """Return the bytes that tensors in use take."""
    return sum(_SLOTS_A_CHUNK - len(free) for free in copies._free.values()) * copies._stride


def bytes_of_slabs(pool: SlabPool) -> int:
    """Return the bytes that slabs, and copies of their tokens, take on a CPU."""
    shape = pool.shape
    # A set, because a slab is in two groups while it grows.
    slabs = {slab for group in pool._all_groups() for slab in group.slabs}
    heads = 2 * len(shape.devices) * shape.kv_heads
    stored = sum(heads * whole_pages(slab.tokens * shape.head_bytes) for slab in slabs)
    return stored + sum(map(bytes_of_copies, pool._copies.values()))


class Watched:
    """A scheduler and a KV store whose memory is compared with the limit whenever it may peak."""

    def __init__(self, shape: KVShape, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        kv = plan_slabs(shape, KVOptions("slabs", prefix_cache=True, bytes=limit))
        assert isinstance(kv.memory, SlabMemory)
        self.memory, self.limit, self.peak = kv.memory, limit, 0
        prefixes = PrefixCache[list[Tensor]](kv.prefixes, enabled=True)
        self.store = KVStore(kv.memory, prefixes)
        self.scheduler = Scheduler(kv.pool, 16, 512, 1000, find_cached=prefixes.find)
        take, move = TensorPool.take, SlabGroup.move

        def taking(copies: TensorPool) -> Tensor:
            taken = take(copies)
            self.look()
            return taken

        def moving(
            group: SlabGroup, row: int, target: SlabGroup, target_row: int, tokens: int
        ) -> None:
            part = group.move_size(tokens)
            self.look(2 * shape.kv_heads * (part * shape.head_bytes + PAGE_BYTES))
            move(group, row, target, target_row, tokens)

        monkeypatch.setattr(TensorPool, "take", taking)
        monkeypatch.setattr(SlabGroup, "move", moving)

    def look(self, beside: int = 0) -> None:
        taken = bytes_of_slabs(self.memory._pool) + beside
        self.peak = max(self.peak, taken)
        assert taken <= self.limit, f"{taken} bytes are taken of {self.limit}"

    def step(self) -> int:
        """Run a step that writes ones as keys and values; return how many sequences have ended."""
        plan = self.scheduler.schedule()
        self.store.allocate_lanes(plan)
        self.look()
        deliveries: list[tuple[Sequence, StepOutput]] = []
        for chunk in plan.chunks:
            sequence, lane = chunk.sequence, self.store.lanes[chunk.sequence]
            assert isinstance(lane, Slab)
            lane.layer(0)[:, :, chunk.start : chunk.end] = 1
            sequence.computed_tokens += chunk.count
            if chunk.draws:
                sequence.tokens.append(len(sequence.tokens) % 50)
                deliveries.append((sequence, StepOutput((1,), "")))
        self.store.cache_prompts(deliveries)
        self.look()
        ended = [each for each, _ in deliveries if len(each.tokens) == each.max_length]
        for sequence in ended:
            self.scheduler.remove(sequence)
            self.store.cache_and_free_lane(sequence)
            self.look()
        self.scheduler.check()
        self.store.check({*self.scheduler.running})
        return len(ended)


def requests(seed: int, longest: int) -> Iterator[Sequence]:
    """Yield requests with prompts of many lengths, many of which share a prefix."""
    draw = random.Random(seed)
    while True:
        length = draw.choice((1, 15, 16, 17, 31, 33, 64, 65, draw.randint(1, longest // 2)))
        new = draw.choice((1, 20, longest - length, draw.randint(1, longest - length)))
        prompt = [place % 50 for place in range(length)]
        if draw.random() < 0.5:
            prompt[draw.randrange(length)] = 77
        yield Sequence.of(Request("x", tuple(prompt), SamplingSettings(new)))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("seed", range(2))
def test_random_requests_stay_within_the_limit_and_finish(
    shape: KVShape, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2500 * shape.bytes_per_token
    watched = Watched(shape, limit, monkeypatch)
    scheduler = watched.scheduler
    coming, ended, steps = requests(seed, scheduler.pool.capacity // 3), 0, 0
    while ended < 24:
        steps += 1
        assert steps < 20_000, "they take each other's memory for ever"
        if len(scheduler.waiting) < 10:
            scheduler.add(next(coming))
        ended += watched.step()
    assert scheduler.preemptions, "the memory was never short"
    assert watched.peak > 0.9 * limit, "much of the memory is never used"
    assert watched.store.prefixes.hits


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_the_longest_sequence_that_fits_has_all_of_the_memory(
    shape: KVShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(shape, 2000 * shape.bytes_per_token, monkeypatch)
    pool = watched.scheduler.pool
    assert 1800 < pool.capacity <= 2000
    assert pool.blocks_for(pool.capacity) <= pool.blocks < pool.blocks_for(pool.capacity + 1)
    for seed in (1, 2):
        prompt = tuple(seed for _ in range(1025))
        sampling = SamplingSettings(pool.capacity - len(prompt))
        watched.scheduler.add(Sequence.of(Request("x", prompt, sampling)))
    ended = 0
    while ended < 2:
        ended += watched.step()


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_what_is_freed_is_given_back(shape: KVShape, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(shape, 3000 * shape.bytes_per_token, monkeypatch)
    for sequence in (next(requests(seed, 900)) for seed in range(8)):
        watched.scheduler.add(sequence)
    for _ in range(5):
        watched.step()
    assert bytes_of_slabs(watched.memory._pool) > 0
    for sequence in tuple(watched.store.lanes):
        watched.scheduler.remove(sequence)
        watched.store.cache_and_free_lane(sequence)
    blocks = len(watched.store.prefixes)
    assert (
        bytes_of_slabs(watched.memory._pool) == blocks * whole_pages(16 * shape.bytes_per_token) > 0
    )
    watched.store.clear()
    assert bytes_of_slabs(watched.memory._pool) == 0
    assert not watched.memory._pool._all_groups()


def resident(*parts: Mapping) -> int:
    """Return how many bytes of the mappings are in physical memory, by /proc/self/pagemap."""
    found = 0
    with Path("/proc/self/pagemap").open("rb") as pages:
        for mapping in parts:
            first, size = mapping.bytes.data_ptr(), mapping.bytes.numel()
            pages.seek(first // PAGE_BYTES * 8)
            entries = torch.frombuffer(
                bytearray(pages.read(size // PAGE_BYTES * 8)), dtype=torch.int64
            )
            found += int((entries < 0).sum()) * PAGE_BYTES  # bit 63 says that the page is present
    return found


def store(slab: Slab, tokens: int) -> None:
    slab.reserve(tokens)
    for layer in range(len(slab._pool.shape.devices)):
        slab.layer(layer)[:, :, :tokens] = 1


@linux
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_counted_bytes_equal_resident_bytes(shape: KVShape) -> None:
    pool = SlabPool(shape)
    slabs = [Slab(pool) for _ in range(4)]
    for slab, tokens in zip(slabs, (1, 40, 64, 33), strict=True):
        store(slab, tokens)

    def given() -> int:
        groups = pool._all_groups()
        return resident(*(rows._mapping for group in groups for rows in group._rows))  # type: ignore[union-attr]

    assert given() == bytes_of_slabs(pool) > 0
    store(slabs[3], 300)  # moves the slab to a group with longer rows
    assert given() == bytes_of_slabs(pool)
    slabs[0].free()  # another slab's row moves into its place
    assert given() == bytes_of_slabs(pool)
    slabs[2].truncate(20)
    assert given() == bytes_of_slabs(pool)
    copy = slabs[2].read(0, 16)
    assert bytes_of_slabs(pool) == given() + whole_pages(16 * shape.bytes_per_token)
    assert all(bool((each == 1).all()) for each in copy)
    del copy
    assert given() == bytes_of_slabs(pool)
    # This check is the last one, because pages that are only read count as present, too.
    assert not slabs[2].layer(0)[:, :, 20:].any()


@linux
def test_copies_give_back_what_they_took() -> None:
    copies = TensorPool((3, 1000), torch.float32)
    kept = [copies.take() for _ in range(100)]
    for number, each in enumerate(kept):
        each[:] = number
    assert bytes_of_copies(copies) == 100 * 3 * PAGE_BYTES
    del kept[::2], each
    assert bytes_of_copies(copies) == 50 * 3 * PAGE_BYTES
    assert resident(*copies._free) == bytes_of_copies(copies)
    assert [int(each[0, 0]) for each in kept] == list(range(1, 100, 2))
    more = [copies.take() for _ in range(50)]
    assert not any(each.any() for each in more), "what is taken is zeros"
    kept.clear()
    more.clear()
    assert bytes_of_copies(copies) == 0
    assert not copies._free
