"""Computes attention over pages by a Triton kernel: one launch a layer, prefilling or decoding.

The kernel is FlashAttention's online softmax (Dao et al. 2022, "FlashAttention") over keys and
values in pages (Kwon et al. 2023, "PagedAttention"), with sliding windows and soft caps. A CUDA
graph can hold it, because the shapes of its inputs and the number of its programs depend on a
step's shape only. Where too few programs would run to fill a GPU, the keys of each sequence are
divided among several, whose results a second kernel combines (Dao et al. 2023, "Flash-Decoding").

To be imported only where pages are used, since `triton` is not installed everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_index import PagedIndex

_SMALLEST_DOT = 16  # the fewest rows and columns that tensor cores multiply
# Bytes of a tile of keys. Two tiles of keys, two of values and the queries fit into 99 KiB.
_TILE_BYTES = 16384


# Triton would compile more kernels for special values of these numbers, which differ between steps.
@triton.jit(do_not_specialize=["tokens", "table_stride", "window", "splits"])
def _attend_kernel(
    output,  # (tokens, heads, head_dim), or float32 (splits, tokens, heads, head_dim)
    maxima,  # (splits, tokens, heads) float32, of the scores of each split; only if `is_split`
    sums,  # the same shape, of exp(score - maximum) in each split; only if `is_split`
    query,  # (tokens, heads, head_dim)
    keys,  # (pages, page, kv_heads, head_dim)
    values,  # the same shape
    block_spans,  # (blocks,) int32, the span that each block's queries belong to
    block_starts,  # (blocks,) int32, the number of each block's first query within its span
    query_ends,  # (n + 1,) int32, 0 and then the cumulative number of queries
    lengths,  # (n,) int32, the number of keys of each sequence
    tables,  # (n, table_stride) int32, the pages of each sequence
    scale,
    softcap,
    query_token_stride,
    query_head_stride,
    tokens,
    table_stride,
    window,
    splits,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
    is_split: tl.constexpr,
    has_softcap: tl.constexpr,
    has_window: tl.constexpr,
):
    fold: tl.constexpr = heads // kv_heads
    block_queries: tl.constexpr = block_rows // fold
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    span = tl.load(block_spans + block)
    first = tl.load(block_starts + block)
    start = tl.load(query_ends + span)
    count = tl.load(query_ends + span + 1) - start
    length = tl.load(lengths + span)
    # A row is one query of one of the heads that share the KV head.
    row = tl.arange(0, block_rows)
    number = first + row // fold
    head = kv_head * fold + row % fold
    real = (row < block_queries * fold) & (number < count)
    dim = tl.arange(0, block_dim)
    in_head = dim < head_dim
    token = (start + number).to(tl.int64)
    q = tl.load(
        query + token[:, None] * query_token_stride + head[:, None] * query_head_stride + dim[None],
        mask=real[:, None] & in_head[None],
        other=0.0,
    )
    place = length - count + number  # the place of each row's own key in its sequence
    last = tl.minimum(length, length - count + first + block_queries)
    begin = 0
    if has_window:
        begin = tl.maximum(0, length - count + first + 1 - window) // block_keys
    tiles = tl.cdiv(last, block_keys) - begin
    # A split's tiles depend on the sequence and the number of splits only, and so do its bits.
    share = tl.cdiv(tiles, splits)
    from_tile = begin + split * share
    to_tile = tl.minimum(begin + tiles, from_tile + share)
    maximum = tl.full([block_rows], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_rows], dtype=tl.float32)
    mixed = tl.zeros([block_rows, block_dim], dtype=tl.float32)
    column = tl.arange(0, block_keys)
    for tile in range(from_tile, to_tile):
        key = tile * block_keys + column
        stored = tl.load(tables + span.to(tl.int64) * table_stride + tile * block_keys // page)
        inside = (tile * block_keys) % page + column
        at = ((stored.to(tl.int64) * page + inside) * kv_heads + kv_head) * head_dim
        written = key < last  # memory behind them is uninitialized, and may be NaN
        k = tl.load(
            keys + at[None] + dim[:, None], mask=written[None] & in_head[:, None], other=0.0
        )
        v = tl.load(
            values + at[:, None] + dim[None], mask=written[:, None] & in_head[None], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if has_softcap:
            # tanh(scores / softcap): Triton's language has no tanh.
            scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
        seen = key[None] <= place[:, None]
        if has_window:
            seen = seen & (key[None] > place[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        # The maximum of a row that has seen no key yet is -inf, and -inf - -inf would be NaN.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - anchor[:, None])
        before = tl.exp(maximum - anchor)
        total = total * before + tl.sum(weights, 1)
        mixed = mixed * before[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
        maximum = higher
    written_rows = real[:, None] & in_head[None]
    if not is_split:
        result = mixed / tl.where(total == 0, 1.0, total)[:, None]
        at_output = (token * heads + head)[:, None] * head_dim + dim[None]
        tl.store(output + at_output, result.to(output.dtype.element_ty), mask=written_rows)
    else:
        part = (split.to(tl.int64) * tokens + token) * heads + head
        tl.store(output + part[:, None] * head_dim + dim[None], mixed, mask=written_rows)
        tl.store(maxima + part, maximum, mask=real)
        tl.store(sums + part, total, mask=real)


@triton.jit(do_not_specialize=["rows"])
def _combine_kernel(
    output,  # (rows, head_dim)
    parts,  # (splits, rows, head_dim) float32
    maxima,  # (splits, rows) float32
    sums,  # (splits, rows) float32
    rows,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    splits: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, splits)
    dim = tl.arange(0, block_dim)
    maximum = tl.load(maxima + part * rows + row)
    weights = tl.exp(maximum - tl.max(maximum, 0))  # 0 for a split without keys
    total = tl.sum(weights * tl.load(sums + part * rows + row), 0)
    mixed = tl.load(
        parts + (part * rows + row)[:, None] * head_dim + dim[None],
        mask=(dim < head_dim)[None],
        other=0.0,
    )
    result = tl.sum(mixed * weights[:, None], 0) / total
    at_output = row * head_dim + dim
    tl.store(output + at_output, result.to(output.dtype.element_ty), mask=dim < head_dim)


def attend_pages(
    query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, params: AttentionParams
) -> Tensor:
    """Attend for a step's packed queries; see `PagedAttention`."""
    # Triton launches on the current device.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        return _attend(query, keys, values, index, params)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, params: AttentionParams
) -> Tensor:
    tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    block_dim = max(_SMALLEST_DOT, triton.next_power_of_2(head_dim))
    assert query.stride(2) == 1, "a head's numbers lie side by side"
    assert keys.is_contiguous(), "pages of one layer lie one after the other"
    assert values.is_contiguous(), "pages of one layer lie one after the other"
    output = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    if index.splits == 1:
        parts = maxima = sums = output
    else:
        parts, maxima, sums = (
            torch.empty(size, dtype=torch.float32, device=query.device)
            for size in (
                (index.splits, tokens, heads, head_dim),
                (index.splits, tokens, heads),
                (index.splits, tokens, heads),
            )
        )
    _attend_kernel[(len(index.block_spans), kv_heads, index.splits)](
        parts,
        maxima,
        sums,
        query,
        keys,
        values,
        index.block_spans,
        index.block_starts,
        index.query_ends,
        index.lengths,
        index.tables,
        head_dim**-0.5 if params.scaling is None else params.scaling,
        params.softcap or 1.0,
        query.stride(0),
        query.stride(1),
        tokens,
        index.tables.stride(0),
        params.window or 0,
        index.splits,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=PAGE,
        block_rows=index.block_rows,
        block_keys=_tile_keys(block_dim * query.element_size()),
        block_dim=block_dim,
        is_split=index.splits > 1,
        has_softcap=params.softcap is not None,
        has_window=params.window is not None,
        num_warps=4,
        num_stages=2,
    )
    if index.splits > 1:
        _combine_kernel[(tokens * heads,)](
            output,
            parts,
            maxima,
            sums,
            tokens * heads,
            head_dim=head_dim,
            block_dim=block_dim,
            splits=index.splits,
            num_warps=1,
        )
    return output


def _tile_keys(bytes_of_a_key: int) -> int:
    """Return the keys in a tile: as many as shared memory has room for, up to 64."""
    return min(64, max(_SMALLEST_DOT, _TILE_BYTES // bytes_of_a_key))
