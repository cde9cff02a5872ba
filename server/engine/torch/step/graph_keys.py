"""Which steps share a captured graph."""

from dataclasses import dataclass
from typing import Final

MOST_DEPTH: Final = 2  # of stacks of affine edits that graphs are made for: each takes memory


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph is made for."""

    rows: int  # sequences, each with one token; fewer are padded
    depth: int  # places in the stacks of affine edits


def buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that there are graphs for: powers of two, and the largest."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)
