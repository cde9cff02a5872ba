"""Reads the table in which kernels find the reward heads of rows.

The table has one row for each slot: `PreparedHead.table_row`, i.e. the addresses of the head's
tensors and their sizes. A slot without a head has zeros.

Import it only where there is a GPU: `triton` is not installed everywhere.
"""

from typing import Final

import triton
import triton.language as tl

FIELDS: Final = tl.constexpr(9)
# Indices of the fields: tensors' addresses, then m (UNITS) and d (WIDTH), both padded.
W1: Final = tl.constexpr(0)
GRAM: Final = tl.constexpr(1)
B1: Final = tl.constexpr(2)
W2: Final = tl.constexpr(3)
DIRECTION: Final = tl.constexpr(4)
W1_DIRECTION: Final = tl.constexpr(5)
TARGET: Final = tl.constexpr(6)
UNITS: Final = tl.constexpr(7)
WIDTH: Final = tl.constexpr(8)


@triton.jit
def head_of(table, slots, row):
    """Return a pointer to the table's row for the head of a logits row."""
    return table + tl.load(slots + row).to(tl.int64) * FIELDS


@triton.jit
def tensor_of(head, field: tl.constexpr):
    """Return a pointer to one of a head's tensors, which are float32 and aligned to 16 bytes."""
    return tl.multiple_of(tl.load(head + field).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def size_of(head, field: tl.constexpr):
    """Return one of a head's sizes, which are padded to multiples of 16."""
    return tl.multiple_of(tl.load(head + field).to(tl.int32), 16)
