"""Tests memory mappings, of which a part can be cleared and given back to the system."""

import pytest

from server.engine.torch.attention.mapped import PAGE_BYTES, Mapping


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 5), (3, PAGE_BYTES), (PAGE_BYTES, 2 * PAGE_BYTES), (7, 3 * PAGE_BYTES + 9), (5, 5)],
)
def test_what_is_cleared_is_zeros_and_nothing_else(start: int, end: int) -> None:
    mapping = Mapping(4 * PAGE_BYTES)
    mapping.bytes[:] = 1
    mapping.clear(start, end)
    assert not mapping.bytes[start:end].any()
    assert (mapping.bytes[:start] == 1).all()
    assert (mapping.bytes[end:] == 1).all()
