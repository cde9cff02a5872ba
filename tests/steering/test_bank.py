"""Tests the bank, which holds maps and reward heads by slot; slot 0 is the identity."""

import importlib

import pytest
import torch

from steering.affine import HAS_GATE, HAS_MAP
from steering.bank import Bank
from steering.grouped_refinement import GroupedRefinement
from steering.route import Span, build_route
from steering.settings import AffineSettings, RewardSettings, SlottedEdit
from tests import oracles
from tests.grouped import use_few_programs
from tests.tiny import SITES, WIDTH, random_head, random_maps

CPU = torch.device("cpu")
SITE = SITES[0]


def one_token_each(*stacks: tuple[SlottedEdit, ...]) -> list[Span]:
    return [
        Span(start=0, count=1, prompt_length=1, rows=range(row, row + 1), edits=stack)
        for row, stack in enumerate(stacks)
    ]


def affine_edit(slot: int, strength: float = 1.0) -> tuple[SlottedEdit, ...]:
    return (SlottedEdit(slot, AffineSettings(strength)),)


@pytest.fixture
def bank() -> Bank:
    bank = Bank(4, CPU)
    bank.put(1, random_maps(1))
    bank.put(2, random_maps(2, support=True))
    bank.put(3, random_head(3))
    bank.put(4, random_head(4, units=7))
    return bank


def test_every_token_is_edited_by_its_own_slot(bank: Bank) -> None:
    route = build_route(one_token_each(affine_edit(1, 0.5), (), affine_edit(2)), CPU)
    z = torch.randn(1, 3, WIDTH)
    edited = bank.edit_site(SITE, z, route)[0]
    first = oracles.affine(z[0, 0], random_maps(1)[SITE], 0.5)
    third = oracles.affine(z[0, 2], random_maps(2, support=True)[SITE], 1.0)
    torch.testing.assert_close(edited[0], first)
    assert torch.equal(edited[1], z[0, 1])
    torch.testing.assert_close(edited[2], third)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slot_0_keeps_values_that_arithmetic_would_change(bank: Bank, dtype: torch.dtype) -> None:
    strange = torch.tensor([-0.0, float("inf"), -float("inf"), 1e-3], dtype=dtype)
    z = strange.repeat(2, WIDTH // 4)[None]
    route = build_route(one_token_each(affine_edit(1), ()), CPU)
    edited = bank.edit_site(SITE, z, route)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(edited[0, 1].view(bits), z[0, 1].view(bits))
    assert not torch.equal(edited[0, 0].view(bits), z[0, 0].view(bits))


def test_a_slot_without_a_map_at_a_site_leaves_it_alone(bank: Bank) -> None:
    bank.put(2, random_maps(5, sites=SITES[1:]))
    z = torch.tensor([-0.0]).repeat(1, 2, WIDTH)
    route = build_route(one_token_each(affine_edit(2), affine_edit(1)), CPU)
    edited = bank.edit_site(SITE, z, route)
    assert torch.equal(edited[0, 0].signbit(), z[0, 0].signbit())
    assert not torch.equal(edited[0, 1], z[0, 1])


def test_a_slot_that_is_filled_again_forgets_what_it_held(bank: Bank) -> None:
    bank.put(2, random_maps(6))  # replaces maps with a support
    z = 5 * torch.randn(1, 1, WIDTH)
    route = build_route(one_token_each(affine_edit(2)), CPU)
    expected = oracles.affine(z[0, 0], random_maps(6)[SITE], 1.0)
    torch.testing.assert_close(bank.edit_site(SITE, z, route)[0, 0], expected)
    bank.put(2, random_head(1))
    assert torch.equal(bank.edit_site(SITE, z, route), z)


def test_a_stack_is_done_in_float32_and_cast_back_once(bank: Bank) -> None:
    stack = affine_edit(1, 0.9) + affine_edit(2, 0.8)
    z = torch.randn(1, 1, WIDTH).bfloat16()
    edited = bank.edit_site(SITE, z, build_route(one_token_each(stack), CPU))
    expected = oracles.affine(z[0, 0].float(), random_maps(1)[SITE], 0.9)
    expected = oracles.affine(expected, random_maps(2, support=True)[SITE], 0.8)
    assert edited.dtype is torch.bfloat16
    torch.testing.assert_close(edited[0, 0], expected.bfloat16(), rtol=0, atol=0)


def test_rows_are_refined_by_their_own_heads_in_order(bank: Bank) -> None:
    first, second = RewardSettings(0.5, 2), RewardSettings(0.1, 4, 0.5)
    stacks = (
        (SlottedEdit(3, first), SlottedEdit(4, second)),
        (),
        (SlottedEdit(4, first),),
        (SlottedEdit(4, second), SlottedEdit(3, first)),
    )
    h = torch.randn(1, 4, WIDTH)
    refined = bank.edit_rows(h, build_route(one_token_each(*stacks), CPU))[0]
    heads = {3: random_head(3), 4: random_head(4, units=7)}
    for row, stack in enumerate(stacks):
        expected = h[0, row]
        for edit in stack:
            assert isinstance(edit.settings, RewardSettings)
            expected = oracles.reward(expected, heads[edit.slot], edit.settings)
        torch.testing.assert_close(refined[row], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(refined[1], h[0, 1])


def test_a_stack_of_rewards_is_done_in_float32_and_cast_back_once(bank: Bank) -> None:
    settings = RewardSettings(0.5, 3)
    stack = (SlottedEdit(3, settings), SlottedEdit(4, settings), SlottedEdit(3, settings))
    h = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    refined = bank.edit_rows(h, build_route(one_token_each(stack), CPU))
    expected = h[0, 0].float()
    for head in (random_head(3), random_head(4, units=7), random_head(3)):
        expected = oracles.reward(expected, head, settings)
    assert refined.dtype is torch.bfloat16
    torch.testing.assert_close(refined[0, 0], expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("slot", [0, 5, -1])
def test_the_identity_cannot_be_replaced(bank: Bank, slot: int) -> None:
    with pytest.raises(IndexError, match=r"outside 1\.\.4"):
        bank.put(slot, random_maps(1))


def test_slots_can_be_filled_after_an_edit_on_another_device(bank: Bank) -> None:
    """An edit in inference mode moves the site's table to the device; slots stay writable."""
    route = build_route(one_token_each(affine_edit(1), affine_edit(2)), CPU)
    with torch.inference_mode():
        edited = bank.edit_site(SITE, torch.zeros(1, 2, WIDTH, device="meta"), route)
    assert edited.device.type == "meta"
    bank.put(1, random_maps(5, support=True))
    bank.put(3, random_head(6))
    bank.clear(2)


def test_maps_are_read_for_what_the_step_s_maps_have(bank: Bank) -> None:
    """A step's edit does not get gates or supports that none of its tokens uses."""
    bank.put(4, random_maps(4, gate=True))

    def read(*slots: int) -> set[str]:
        route = build_route(one_token_each(*map(affine_edit, slots)), CPU)
        assert route.affine is not None
        table = bank.tables_for(route.affine)[SITE]
        return {name for name, each in table._asdict().items() if each is not None}

    assert read(1) == {"flags", "delta", "bias"}
    assert read(1, 2) == {"flags", "delta", "bias", "low", "high"}
    assert read(4) == {"flags", "delta", "bias", "gate_weight", "gate_bias"}


def test_kernels_refine_rows_by_the_heads_of_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the bank refines rows by these kernels; here Triton interprets them."""
    pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
    if torch.cuda.is_available():
        pytest.skip("they are compiled here, and not interpreted")
    launches = importlib.import_module("steering.kernels.reward_triton")
    use_few_programs(monkeypatch, launches)
    bank = Bank(4, CPU)
    bank.grouped = GroupedRefinement(5, CPU, launches)
    heads = {3: random_head(3), 4: random_head(4, units=7)}
    for slot, head in heads.items():
        bank.put(slot, head)
    bank.put(3, heads[4])
    bank.put(3, random_maps(1))  # removes the slot's head
    bank.put(3, heads[3])
    settings = RewardSettings(0.5, 2), RewardSettings(0.1, 4, 0.5)
    stacks = [(SlottedEdit(3 + row % 2, settings[row // 2]),) for row in range(4)]
    h = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    refined = bank.edit_rows(h, build_route(one_token_each(*stacks, ()), CPU))
    for row, [edit] in enumerate(stacks):
        assert isinstance(edit.settings, RewardSettings)
        expected = oracles.reward(h[row], heads[edit.slot], edit.settings)
        torch.testing.assert_close(refined[row], expected, rtol=1e-4, atol=1e-4)
    bank.clear(3)
    assert not bank.grouped.has_heads([3])


def test_sites_allocated_with_all_parts_keep_their_tensors() -> None:
    """A compiled model holds the tensors themselves."""
    bank = Bank(2, CPU)
    bank.allocate_sites(dict.fromkeys(SITES, WIDTH), all_parts=True)
    before = {site: bank.table(site) for site in SITES}
    bank.put(1, random_maps(1, support=True))
    bank.put(2, random_maps(2, gate=True))
    bank.clear(1)
    for site, table in before.items():
        assert all(now is then for now, then in zip(bank.table(site), table, strict=True))
        assert None not in table
        assert table.flags.tolist() == [0, 0, HAS_MAP | HAS_GATE]
