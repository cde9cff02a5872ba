"""The table in which kernels find the reward heads of rows.

A head is a row of it, which has `PreparedHead.fields`: where its tensors lie, and their sizes.
Zeros are no head.

Imported where there is a GPU only: `triton` is not installed everywhere.
"""

from typing import Final

import triton
import triton.language as tl

FIELDS: Final = tl.constexpr(9)
# Tensors' addresses, then sizes: how many units, and how wide W1 is, both padded.
W1: Final = tl.constexpr(0)
GRAM: Final = tl.constexpr(1)
B1: Final = tl.constexpr(2)
W2: Final = tl.constexpr(3)
DIRECTION: Final = tl.constexpr(4)
ALONG: Final = tl.constexpr(5)
WANTED: Final = tl.constexpr(6)
UNITS: Final = tl.constexpr(7)
WIDTH: Final = tl.constexpr(8)


@triton.jit
def head_of(table, slots, row):
    """A row's own row of the table."""
    return table + tl.load(slots + row).to(tl.int64) * FIELDS


@triton.jit
def tensor_of(head, field: tl.constexpr):
    """Where one of a head's tensors begins: all are float32, and aligned."""
    return tl.multiple_of(tl.load(head + field).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def size_of(head, field: tl.constexpr):
    """One of a head's sizes, which are padded to multiples of 16."""
    return tl.multiple_of(tl.load(head + field).to(tl.int32), 16)
