"""Which pages and which queries each program of a step's attention over pages reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.page_pool import PAGE

# Rows of queries that one program multiplies, at least. Registers hold more of prompts in half
# precision only.
_DECODING_ROWS: Final = 16
_READING_ROWS: Final = {2: 64, 4: 16}  # by bytes of a number
_PROGRAMS_PER_PROCESSOR: Final = 2
SPLITS: Final = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Who owns which of a step's n pieces of packed tokens, and where their K and V are.

    A piece's queries are divided into blocks; each program attends for one block and one KV head.
    """

    slots: Tensor  # (tokens,) int64: where each token's K and V go, page * 64 + place in it
    query_ends: Tensor  # (n + 1,) int32: 0, then how many tokens all pieces so far have
    lengths: Tensor  # (n,) int32: keys of each, those of before too
    tables: Tensor  # (n, pages) int32: each one's pages
    owners: Tensor  # (blocks,) int32: the piece of each block of queries
    firsts: Tensor  # (blocks,) int32: the block's first query among its piece's
    block_rows: int  # a block's queries, times the heads that share a KV head, at most
    splits: int  # among how many programs the keys of a block are divided
    most_keys: int  # of a piece


PagedAttention: TypeAlias = Callable[[Tensor, Tensor, Tensor, PagedIndex, AttentionParams], Tensor]
"""Lets each query see its sequence's keys up to its own, or the last `window` of them.

Takes query: (tokens, heads, head_dim); keys, values: (pages, 64, kv_heads, head_dim), in which the
step's own are stored already; the step's index, on their device; and what the layer asks for.
Returns (tokens, heads, head_dim).
"""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Divides a step's attention into programs."""

    heads: int  # of queries
    kv_heads: int
    itemsize: int  # bytes of a number
    processors: int  # multiprocessors of the device

    @property
    def fold(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    def block_rows(self, most_queries: int) -> int:
        """Rows of a block where the longest piece has so many queries: a power of two."""
        rows = _DECODING_ROWS if most_queries == 1 else _READING_ROWS[self.itemsize]
        return max(rows, 1 << (self.fold - 1).bit_length())

    def splits(self, blocks: int) -> int:
        """Among how many programs the keys are divided of so many sequences that decode.

        So many that all processors have some. As it depends on nothing else, a sequence's result
        has the same bits beside any others in a step of the same shape.
        """
        wanted = _PROGRAMS_PER_PROCESSOR * self.processors // (blocks * self.kv_heads)
        return max(each for each in SPLITS if each <= max(wanted, 1))


def build_index(
    tables: Tensor, starts: Sequence[int], counts: Sequence[int], tiling: Tiling
) -> PagedIndex:
    """The index of a step's pieces, on the CPU.

    Args:
        tables: (n, pages) int32, the pages of each piece's sequence.
        starts: tokens that are stored of each piece's sequence already.
        counts: tokens of each piece.
    """
    started, counted = torch.tensor(starts), torch.tensor(counts)
    lengths = started + counted
    most_keys = int(lengths.max())
    tables = tables[:, : -(-most_keys // PAGE)]
    block_rows = tiling.block_rows(max(counts))
    block = block_rows // tiling.fold
    blocks = (counted + block - 1) // block
    owners, firsts = _owners(blocks)
    query_ends = torch.zeros(len(counts) + 1, dtype=torch.int32)
    query_ends[1:] = counted.cumsum(0)
    return PagedIndex(
        slots=_slots(tables, started, counted),
        query_ends=query_ends,
        lengths=lengths.int(),
        tables=tables,
        owners=owners.int(),
        firsts=(firsts * block).int(),
        block_rows=block_rows,
        # Prompts have programs enough.
        splits=tiling.splits(len(owners)) if max(counts) == 1 else 1,
        most_keys=most_keys,
    )


def _owners(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of what n owners have, one's after another's: whose each is, and its number among those."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    firsts = counts.cumsum(0) - counts
    return owners, torch.arange(len(owners)) - firsts[owners]


def _slots(tables: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Where the tokens of each piece go: (tokens,) int64, page * 64 + place in the page."""
    owners, numbers = _owners(counts)
    places = starts[owners] + numbers
    return tables[owners, places // PAGE].long() * PAGE + places % PAGE
