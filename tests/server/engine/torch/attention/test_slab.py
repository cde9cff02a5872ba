"""Tests slabs, each of which holds the keys and values of one sequence contiguously."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.torch.attention.slab import KVShape, Slab, SlabPool

CPU = torch.device("cpu")
SHAPE = KVShape(2, 8, torch.float32, (CPU, CPU))


def fill(slab: Slab, value: float, tokens: int) -> None:
    for layer in range(2):
        slab.layer(layer)[:, :, :tokens] = value + layer


def holds(slab: Slab, value: float, tokens: int) -> bool:
    return all(bool((slab.layer(i)[:, :, :tokens] == value + i).all()) for i in range(2))


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes_per_token_and_layer == 2 * 2 * 8 * 4
    assert SHAPE.bytes_per_token == 2 * SHAPE.bytes_per_token_and_layer


def test_a_slab_grows_by_what_is_asked_and_keeps_what_it_holds() -> None:
    slab = Slab(SlabPool(SHAPE))
    assert slab.capacity == 0
    slab.reserve(5)
    fill(slab, 3.0, 5)
    before = slab.capacity
    slab.reserve(before)
    assert slab.capacity == before
    slab.reserve(before + 1)
    assert before < slab.capacity < 3 * before
    assert slab.layer(0).shape == (2, 2, slab.capacity, 8)
    assert holds(slab, 3.0, 5)


@pytest.mark.parametrize("tokens", [1, 64, 65, 97, 1000, 5000, 20000])
def test_a_slab_is_at_most_half_again_as_large_as_what_it_is_for(tokens: int) -> None:
    slab = Slab(SlabPool(SHAPE))
    slab.reserve(tokens)
    assert tokens <= slab.capacity <= max(64, 1.5 * tokens)


def test_each_layer_keeps_its_keys_and_values_on_its_own_device() -> None:
    slab = Slab(SlabPool(KVShape(2, 8, torch.float32, (CPU, torch.device("meta")))))
    slab.reserve(1)
    assert [slab.layer(index).device.type for index in range(2)] == ["cpu", "meta"]


def test_reused_slab_memory_is_zero() -> None:
    """Attention reads beyond a sequence's end, where a NaN would pass through the mask."""
    pool = SlabPool(SHAPE)
    neighbour, first = Slab(pool), Slab(pool)
    neighbour.reserve(10)
    first.reserve(10)
    fill(first, torch.nan, first.capacity)
    first.free()
    second = Slab(pool)
    second.reserve(10)
    assert second.group is neighbour.group
    assert not second.layer(0).any()
    fill(second, torch.nan, 10)
    second.reserve(200)
    assert not second.layer(1)[:, :, 10:].any()


def test_what_is_read_can_be_written_elsewhere() -> None:
    pool = SlabPool(SHAPE)
    source, copy = Slab(pool), Slab(pool)
    source.reserve(40)
    fill(source, 5.0, 40)
    copy.write(16, source.read(0, 16))
    fill(source, 6.0, 40)
    assert (copy.layer(1)[:, :, 16:32] == 6.0).all()  # `fill` adds the layer's index, 1, to 5
    assert not copy.layer(1)[:, :, :16].any()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), max_size=30))
def test_slabs_keep_what_they_hold_whoever_comes_grows_and_goes(
    steps: Sequence[tuple[int, int]],
) -> None:
    pool = SlabPool(SHAPE)
    slabs: dict[int, tuple[Slab, int]] = {}
    for number, (name, tokens) in enumerate(steps):
        if name in slabs and tokens % 3 == 0:
            slabs.pop(name)[0].free()
        else:
            slab, _ = slabs.get(name, (Slab(pool), 0))
            slab.reserve(tokens)
            fill(slab, 10.0 * number, slab.tokens)
            slabs[name] = slab, number
        pool.check(slab for slab, _ in slabs.values())
        for slab, written in slabs.values():
            assert holds(slab, 10.0 * written, slab.tokens)
