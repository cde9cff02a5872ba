"""Tests the affine kernel, interpreted on the CPU and compiled for GPUs that are not present.

Each token is edited by a stack of maps, given by their slots in a table. A map may have a support
(bounds outside of which coordinates are left alone) and a gate (a factor of its strength).
Its tests on a GPU are in `tests/cuda`.
"""

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering.affine import AffineMap, Gate, MapTable, edit_stacks
from steering.dose import MAX_DOSE
from tests.affine_batches import (
    BOTH,
    GATED,
    PLAIN,
    SORTS,
    SUPPORTED,
    Batch,
    Sort,
    bits_of,
    by_oracle,
    odd_rows,
    random_batch,
    random_maps,
    table_of,
)
from tests.gpu_code import compiled_for_gpus

pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
CPU = torch.device("cpu")
WIDTH = 32
# Triton's interpreter warns about NaN and overflow, and pytest turns warnings into errors.
ODD = pytest.mark.filterwarnings("ignore::RuntimeWarning")
Edit: TypeAlias = Callable[[Batch, Tensor | None], Tensor]


@pytest.fixture(scope="module")
def edit() -> Edit:
    if torch.cuda.is_available():
        pytest.skip("it is compiled here, and not interpreted")
    from steering.kernels.affine_triton import edit_stacks_triton  # noqa: PLC0415  Triton may lack

    return lambda batch, doses: edit_stacks_triton(
        batch.activations, batch.slots, batch.strength, batch.table, doses
    )


def plainly(batch: Batch, doses: Tensor | None) -> Tensor:
    return edit_stacks(batch.activations, batch.slots, batch.strength, batch.table, doses)


def table(sorts: tuple[Sort, ...] = SORTS, width: int = WIDTH) -> MapTable:
    return table_of(random_maps(width, sorts), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 5, 32, 100, 257])
def test_stacks_of_all_sorts_of_maps_equal_the_oracle(
    edit: Edit, width: int, dtype: torch.dtype
) -> None:
    """A batch mixes tokens with maps of all sorts and tokens without a map.

    bfloat16 is left out, because Triton's interpreter multiplies it as integers.
    """
    maps = random_maps(width)
    batch = random_batch(table_of(maps, CPU), 12, 4, dtype)
    doses = batch.new_doses()
    found = edit(batch, doses)
    assert found.is_contiguous()
    expected, expected_doses = by_oracle(batch, maps)
    plain_doses = batch.new_doses()
    plain = plainly(batch, plain_doses)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-3, 1e-3)
    for right, right_doses in ((expected, expected_doses), (plain, plain_doses)):
        torch.testing.assert_close(found, right, rtol=rtol, atol=atol)
        torch.testing.assert_close(doses, right_doses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sorts", [(PLAIN,), (PLAIN, SUPPORTED), (GATED, PLAIN), (BOTH,)])
def test_tables_without_supports_or_gates_are_edited(
    edit: Edit, sorts: tuple[Sort, ...], depth: int
) -> None:
    batch = random_batch(table(sorts), 6, depth, seed=depth)
    assert (batch.table.low is None) is not any(sort.support for sort in sorts)
    assert (batch.table.gate_weight is None) is not any(sort.gate for sort in sorts)
    torch.testing.assert_close(edit(batch, None), plainly(batch, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 100])
def test_inputs_are_read_where_they_lie(edit: Edit, width: int) -> None:
    """Inputs may be strided or unaligned views, such as parts of a graph's buffers."""
    batch = random_batch(table(width=width), 5, 2)
    doses = batch.new_doses()
    expected = bits_of(edit(batch, doses))
    for first, apart in ((0, 48), (16, 64), (1, 7)):
        rows = torch.full((5, width + apart), torch.nan)[:, first : first + width]
        slots, strength, all_doses = torch.ones(4, 9).long(), torch.ones(4, 8), torch.ones(2, 4, 9)
        own = all_doses[:, :2, 3:8].zero_()
        views = Batch(rows, slots[1:3, 2:7], strength[:2, 3:], batch.table)
        for name in ("activations", "slots", "strength"):
            getattr(views, name).copy_(getattr(batch, name))
        assert torch.equal(bits_of(edit(views, own)), expected)
        assert torch.equal(own, doses)
        assert int(all_doses.sum() - own.sum()) == 2 * 4 * 9 - own.numel()
    activations, slots, strength = (
        each.t().contiguous().t() for each in (batch.activations, batch.slots, batch.strength)
    )
    across = Batch(activations, slots, strength, batch.table)
    assert torch.equal(bits_of(edit(across, None)), expected)


@ODD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_without_a_map_keeps_its_bits(edit: Edit, dtype: torch.dtype) -> None:
    """Tokens of slot 0, and of a slot without a map here, keep their bits in any batch."""
    maps = random_maps(WIDTH)
    batch = Batch(
        odd_rows(4, WIDTH, dtype, CPU),
        torch.tensor([[0, 5, 0, 1], [5, 5, 0, 0]]),
        torch.ones(2, 4),
        table_of(maps, CPU),
    )
    doses = batch.new_doses()
    found = edit(batch, doses)
    assert torch.equal(bits_of(found[:3]), bits_of(batch.activations[:3]))
    assert not doses[:, :, :3].any()
    assert doses[1, :, 3].tolist() == [1, 0]
    assert torch.equal(bits_of(edit(batch.tokens(slice(1)), None)), bits_of(found[:1]))


def test_a_coordinate_outside_the_support_keeps_its_bits(edit: Edit) -> None:
    ones = torch.ones(4)
    maps = {1: AffineMap(3 * ones, ones, low=-ones, high=ones)}
    z = torch.tensor([[-1.5, -1.0, 1.0, 1.5]])
    batch = Batch(z, torch.ones(1, 1).long(), torch.ones(1, 1), table_of(maps, CPU))
    assert edit(batch, None).tolist() == [[-1.5, -2.0, 4.0, 1.5]]


@ODD
def test_nan_gates_leave_coordinates_outside_the_support(edit: Edit) -> None:
    """A gate that is NaN changes its map's coordinates, but none outside the map's support."""
    width = 5  # the kernel reads 8 columns, of which 3 must not count
    maps = random_maps(width)
    zero, one = torch.zeros(width), torch.ones(width)
    maps[5] = AffineMap(one, one, low=9 * one, high=8 * one, gate=Gate(one, zero[0]))
    rows = odd_rows(8, width, torch.float32, CPU).clone()
    rows[:6] = torch.tensor([0.0, 1e-30, 2e-7, 1.0, 1e20, 3e37])[:, None]
    rows[6, 1:] = 1.0
    slots, strength = torch.tensor([[5] * 8, [1, 1, 1, 4, 2, 3, 4, 2], [3] * 8]), torch.ones(3, 8)
    strength[0, 3] = torch.inf
    batch = Batch(rows, slots, strength, table_of(maps, CPU))
    doses, expected_doses = batch.new_doses(), batch.new_doses()
    expected = plainly(batch, expected_doses)
    assert expected.isnan().any()
    assert (expected_doses == MAX_DOSE).any()
    torch.testing.assert_close(edit(batch, doses), expected, equal_nan=True)
    torch.testing.assert_close(doses, expected_doses)


def test_doses_are_added_and_leave_the_edits_as_they_are(edit: Edit) -> None:
    batch = random_batch(table(), 6, 3)
    once, twice = batch.new_doses(), batch.new_doses()
    found = [edit(batch, doses) for doses in (None, once, twice, twice)]
    for each in found[1:]:
        assert torch.equal(bits_of(each), bits_of(found[0]))
    assert once.any()
    assert torch.equal(twice, 2 * once)


def test_no_tokens_are_no_work(edit: Edit) -> None:
    batch = random_batch(table(), 3, 2, torch.float16).tokens(slice(0))
    found = edit(batch, batch.new_doses())
    assert found.shape == (0, WIDTH)
    assert found.dtype == torch.float16


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 5), depth=st.integers(1, 4))
def test_a_token_has_the_same_bits_whoever_is_beside_it(
    edit: Edit, seed: int, tokens: int, depth: int
) -> None:
    batch = random_batch(table(width=20), tokens, depth, seed=seed)
    found = bits_of(edit(batch, None))
    for token in range(tokens):
        alone = edit(batch.tokens(slice(token, token + 1)), None)
        assert torch.equal(bits_of(alone)[0], found[token])


def test_it_compiles_for_an_a100_and_an_h100() -> None:
    """The compiled kernel spills no registers, except a few for the widest rows."""
    for row in compiled_for_gpus("affine_compiler"):
        assert row["spilled"] <= (128 if row["width"] > 16384 else 0), row
        assert row["wide_reads"], row
