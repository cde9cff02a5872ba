"""Tests the table that gives interventions slots in the bank, with pins and LRU eviction."""

import pytest

from server.engine.errors import BankFullError
from server.engine.slots import SlotTable


def test_the_least_recently_used_slot_that_nobody_pins_is_taken() -> None:
    table = SlotTable(3)
    slots = {digest: table.take(digest) for digest in "abc"}
    assert sorted(slots.values()) == [1, 2, 3]
    for digest in "abc":
        table.unpin(digest)
    assert table.pin("a") == slots["a"]  # makes `a` the most recently used
    table.unpin("a")
    assert table.take("d") == slots["b"]
    assert table.pin("b") is None
    assert table.used == 3


def test_pinned_slots_are_never_taken() -> None:
    table = SlotTable(2)
    held = table.take("a")
    table.take("b")
    table.unpin("b")
    assert table.take("c") != held
    with pytest.raises(BankFullError, match="all 2 slots"):
        table.take("d")
    assert table.pin("a") == held
    assert table._pins.total() == 3


def test_a_slot_whose_loading_failed_is_free_again() -> None:
    table = SlotTable(1)
    table.take("a")
    table.drop("a")
    assert table.used == table._pins.total() == 0
    assert table.take("b") == 1


def test_a_check_finds_pins_that_nobody_holds() -> None:
    table = SlotTable(2)
    table.take("a")
    table.check({"a": 1})
    with pytest.raises(AssertionError, match="pins are lost"):
        table.check({})
    table.unpin("a")
    table.check({})
    with pytest.raises(AssertionError, match="pins are lost"):
        table.check({"a": 1})
