"""Decides which steps share a captured CUDA graph."""

from dataclasses import dataclass
from typing import Final

MAX_DEPTH: Final = 2  # the deepest stack of affine edits with graphs, as each graph takes memory


@dataclass(frozen=True, slots=True)
class GraphKey:
    """The steps that a graph serves."""

    rows: int  # sequences, each with one token; steps of fewer are padded
    depth: int  # affine edits in the deepest stack


def buckets(most: int) -> tuple[int, ...]:
    """Return the numbers of rows that graphs have: the powers of two below `most`, and `most`."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)
