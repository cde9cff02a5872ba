"""Tells each program of a step's attention over pages which pages and queries it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.page_pool import PAGE

# The least number of rows in a program's block, in steps that only decode and in all others. A row
# is one query of one head. Registers hold more than 16 rows in half precision only.
_DECODING_ROWS: Final = 16
_READING_ROWS: Final = {2: 64, 4: 16}  # by bytes of a number
_PROGRAMS_PER_PROCESSOR: Final = 2  # keys are divided among no more programs than this allows
SPLITS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Says where a step's packed tokens are, and where their K and V are.

    The packed tokens are n spans, each of which is consecutive tokens of one sequence. A span's
    queries are divided into blocks; each program attends for one block and one KV head, over all
    of its keys or one of several parts of them.
    """

    slots: Tensor  # (tokens,) int64: where each token's K and V go, page * 64 + place in the page
    query_ends: Tensor  # (n + 1,) int32: 0, then the cumulative number of tokens
    lengths: Tensor  # (n,) int32: each span's number of keys, those stored before included
    tables: Tensor  # (n, pages) int32: the pages of each span's sequence, in order
    block_spans: Tensor  # (blocks,) int32: the span that each block's queries belong to
    block_starts: Tensor  # (blocks,) int32: the number of each block's first query within its span
    block_rows: int  # a block's queries, times the heads that share a KV head, at most
    splits: int  # the number of programs that the keys of a block are divided among
    max_keys: int  # the most keys that a span has, or in a graph may have


PagedAttention: TypeAlias = Callable[[Tensor, Tensor, Tensor, PagedIndex, AttentionParams], Tensor]
"""Attends for packed queries, each over its sequence's keys up to its own (or the last `window`).

Takes query: (tokens, heads, head_dim); keys, values: (pages, 64, kv_heads, head_dim), in which the
step's own are stored already; the step's index, on the same device; and the layer's parameters.
Returns (tokens, heads, head_dim).
"""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Divides a step's attention into programs."""

    heads: int  # query heads
    kv_heads: int
    itemsize: int  # bytes of a number
    processors: int  # multiprocessors of the device

    @property
    def fold(self) -> int:
        """The number of query heads that share a KV head."""
        return self.heads // self.kv_heads

    def block_rows(self, max_queries: int) -> int:
        """Return the rows of a block, a power of two.

        Args:
            max_queries: the number of queries of the step's longest span.
        """
        rows = _DECODING_ROWS if max_queries == 1 else _READING_ROWS[self.itemsize]
        return max(rows, 1 << (self.fold - 1).bit_length())

    def splits(self, blocks: int) -> int:
        """Return among how many programs each sequence's keys are divided in a decoding step.

        Keys are divided until each multiprocessor has one or two programs, as far as `SPLITS` goes.
        The number depends on `blocks` only, so a sequence's result has the same bits in all steps
        of one shape.

        Args:
            blocks: the number of sequences, each of which has one block.
        """
        wanted = _PROGRAMS_PER_PROCESSOR * self.processors // (blocks * self.kv_heads)
        return max(each for each in SPLITS if each <= max(wanted, 1))


def build_index(
    tables: Tensor, starts: Sequence[int], counts: Sequence[int], tiling: Tiling
) -> PagedIndex:
    """Build the index of a step's spans, on the CPU.

    Args:
        tables: (n, pages) int32, the pages of each span's sequence.
        starts: for each span, how many tokens of its sequence are stored already.
        counts: the number of tokens of each span.
    """
    started, counted = torch.tensor(starts), torch.tensor(counts)
    lengths = started + counted
    max_keys = int(lengths.max())
    tables = tables[:, : -(-max_keys // PAGE)]
    block_rows = tiling.block_rows(max(counts))
    block = block_rows // tiling.fold
    blocks = (counted + block - 1) // block
    block_spans, block_numbers = _items_by_owner(blocks)
    query_ends = torch.zeros(len(counts) + 1, dtype=torch.int32)
    query_ends[1:] = counted.cumsum(0)
    return PagedIndex(
        slots=_slots(tables, started, counted),
        query_ends=query_ends,
        lengths=lengths.int(),
        tables=tables,
        block_spans=block_spans.int(),
        block_starts=(block_numbers * block).int(),
        block_rows=block_rows,
        # A step with prompts has enough programs without splitting keys.
        splits=tiling.splits(len(block_spans)) if max(counts) == 1 else 1,
        max_keys=max_keys,
    )


def _items_by_owner(counts: Tensor) -> tuple[Tensor, Tensor]:
    """List n owners' items, owner by owner.

    Args:
        counts: (n,), how many items each owner has.

    Returns:
        Each item's owner, and its number among that owner's items.
    """
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first_items = counts.cumsum(0) - counts
    return owners, torch.arange(len(owners)) - first_items[owners]


def _slots(tables: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Return where each packed token's K and V go: (tokens,) int64, page * 64 + place in it."""
    owners, numbers = _items_by_owner(counts)
    places = starts[owners] + numbers
    return tables[owners, places // PAGE].long() * PAGE + places % PAGE
