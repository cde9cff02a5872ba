"""Lists the blocks of the KV cache that must be zeroed before a step.

Attention reads the whole of a block, and multiplies what it must not see by 0. Keys and values of a
request that was steered too strongly may be NaN, and 0 times NaN is NaN. Without zeroing, they
would reach the next request in their block. vLLM zeroes blocks for some kinds of models only.
"""

from collections.abc import Iterator, Sequence
from typing import Any


def unfilled_blocks(scheduler_output: Any, groups: Sequence[Any]) -> Iterator[int]:
    """Yield the blocks that requests are given in a step and that hold no computed token yet.

    Args:
        scheduler_output: vLLM's `SchedulerOutput`.
        groups: vLLM's `KVCacheGroupSpec` of each group of layers.
    """
    for new in scheduler_output.scheduled_new_reqs:
        yield from _beyond(groups, new.block_ids, new.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:
            # A request that goes on is given new blocks only; one that comes back, all.
            comes_back = request_id in cached.resumed_req_ids
            yield from _beyond(groups, blocks, computed if comes_back else 0)


def _beyond(groups: Sequence[Any], blocks: Sequence[list[int]], computed: int) -> Iterator[int]:
    """Yield a request's blocks, of each group of layers, that hold no computed token."""
    for group, ids in zip(groups, blocks, strict=True):
        yield from ids[computed // group.kv_cache_spec.block_size :]
