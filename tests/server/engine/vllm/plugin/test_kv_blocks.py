"""Which blocks are zeroed before a step. The scheduler's output is vLLM's in shape only."""

from types import SimpleNamespace

from server.engine.vllm.plugin.kv_blocks import unfilled_blocks

GROUPS = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in (4, 8)]


def new(computed: int, *blocks: list[int]) -> SimpleNamespace:
    return SimpleNamespace(block_ids=blocks, num_computed_tokens=computed)


def output(new_requests: list[SimpleNamespace], **cached: object) -> SimpleNamespace:
    nothing: dict[str, object] = {
        "req_ids": [],
        "new_block_ids": [],
        "num_computed_tokens": [],
        "resumed_req_ids": set(),
    }
    return SimpleNamespace(
        scheduled_new_reqs=new_requests, scheduled_cached_reqs=SimpleNamespace(**nothing | cached)
    )


def test_all_blocks_of_a_request_that_begins_are_zeroed_but_those_from_the_cache() -> None:
    requests = [new(0, [1, 2], [3]), new(8, [4, 5, 6], [7, 8])]
    assert list(unfilled_blocks(output(requests), GROUPS)) == [1, 2, 3, 6, 8]


def test_a_block_of_which_a_part_is_computed_is_zeroed_before_vllm_copies_that_part() -> None:
    assert list(unfilled_blocks(output([new(6, [1, 2], [3])]), GROUPS)) == [2, 3]


def test_blocks_that_a_request_is_given_as_it_goes_on_are_zeroed() -> None:
    scheduled = output(
        [],
        req_ids=["a", "b"],
        new_block_ids=[None, ([9], [])],
        num_computed_tokens=[5, 12],
    )
    assert list(unfilled_blocks(scheduled, GROUPS)) == [9]


def test_of_a_request_that_comes_back_the_blocks_beyond_its_computed_tokens_are_zeroed() -> None:
    """The V1 runner is given all of its blocks."""
    scheduled = output(
        [],
        req_ids=["a"],
        new_block_ids=[([1, 2, 3], [4, 5])],
        num_computed_tokens=[8],
        resumed_req_ids={"a"},
    )
    assert list(unfilled_blocks(scheduled, GROUPS)) == [3, 5]
