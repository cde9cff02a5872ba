"""Tests the accounting of KV blocks."""

import pytest

from server.engine.torch.scheduling.block_pool import BlockPool


def test_blocks_are_held_and_given_back() -> None:
    pool = BlockPool(blocks=10, block_size=16)
    assert pool.capacity == 160
    assert pool.allocate("a", tokens=17)
    assert pool.free_blocks == 8
    assert pool.usage == pytest.approx(0.2)
    assert not pool.allocate("b", tokens=8 * 16 + 1)
    assert pool.free_blocks == 8
    assert pool.allocate("b", tokens=8 * 16)
    pool.release("a")
    pool.release("a")
    assert pool.free_blocks == 2
    pool.check(["b"])


def test_an_owner_takes_only_the_blocks_that_it_lacks() -> None:
    pool = BlockPool(blocks=3, block_size=4)
    assert [pool.allocate("a", tokens) for tokens in (1, 4, 5, 8, 3)] == [True] * 5
    assert pool.free_blocks == 1
    assert not pool.allocate("a", 13)
    assert pool.free_blocks == 1
    assert pool.allocate("a", 12)
    pool.release("a")
    assert pool.free_blocks == 3


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (0, 0)])
def test_tokens_are_rounded_up_to_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(10, 16).blocks_for(tokens) == blocks


def test_a_check_finds_blocks_that_are_lost_and_blocks_held_for_nobody() -> None:
    pool = BlockPool(blocks=10, block_size=16)
    pool.allocate("a", 1)
    with pytest.raises(AssertionError, match="for nobody"):
        pool.check(["b"])
    pool.free_blocks -= 1
    with pytest.raises(AssertionError, match="lost"):
        pool.check(["a"])
