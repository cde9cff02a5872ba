import pytest

from server.engine.torch.kv_cache import BlockPool


def test_blocks_are_reserved_and_given_back() -> None:
    pool = BlockPool(blocks=10, block_size=16)
    assert pool.reserve("a", tokens=17)
    assert pool.free == 8
    assert pool.usage == pytest.approx(0.2)
    assert not pool.reserve("b", tokens=8 * 16 + 1)
    assert pool.free == 8
    assert pool.reserve("b", tokens=8 * 16)
    pool.release("a")
    pool.release("a")
    assert pool.free == 2


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (0, 0)])
def test_tokens_are_rounded_up_to_blocks(tokens: int, blocks: int) -> None:
    assert BlockPool(10, 16).needed(tokens) == blocks
