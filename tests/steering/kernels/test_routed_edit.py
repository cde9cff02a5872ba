"""Tests the edit in place by a step's route, in torch and by Triton's interpreter.

A step's tensors are larger than what the step uses of them: a column for each edited row. What lies
beyond is of other steps, and must not be read.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from steering.affine import ALL_MAPPED, edit_stacks
from steering.kernels.routed_edit import RoutedEdit, StepTensors, edit_in_place, routed_edit
from steering.site_maps import SiteMaps
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
)

CPU = torch.device("cpu")
WIDTH = 32
ROWS = 7
COLUMNS = 11  # more than rows
MOST = 4
INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A batch in the tensors of a step, with rubbish beyond what it uses."""

    batch: Batch
    site: SiteMaps
    tensors: StepTensors
    used_flags: Tensor

    def edited(self, edit: RoutedEdit) -> Tensor:
        activations = self.batch.activations.clone()
        edit(activations, self.tensors, self.used_flags, self.site.table)
        return activations


def step_of(batch: Batch, site: SiteMaps, *, dense: bool, is_measured: bool = False) -> Step:
    """Lay out a batch: with a column for each row, or for each row that is edited."""
    depth, tokens = batch.slots.shape
    rows = torch.arange(tokens) if dense else batch.slots.any(dim=0).nonzero().flatten()
    columns = len(rows)
    slots = torch.ones(MOST, COLUMNS, dtype=torch.int64)
    slots[:depth, :columns] = batch.slots[:, rows]
    strength = torch.full((MOST, COLUMNS), torch.nan)
    strength[:depth, :columns] = batch.strength[:, rows]
    all_rows = torch.zeros(COLUMNS, dtype=torch.int64)
    all_rows[:columns] = rows
    is_full = bool(slots[:depth, :columns].all())
    tensors = StepTensors(
        extent=torch.tensor([depth, columns, is_full, is_measured, columns]),
        rows=all_rows,
        slots=slots,
        strength=strength,
        doses=torch.zeros(2, MOST, COLUMNS),
        seconds=torch.zeros(2, dtype=torch.float64),
    )
    used = frozenset(batch.slots.flatten().tolist()) - {0}
    return Step(batch, site, tensors, torch.tensor([site.flags_of(used)], dtype=torch.int32))


def site_of(sorts: tuple[Sort, ...]) -> SiteMaps:
    """Fill slots from 1 on; the last one, and slot 0, have no map."""
    maps = random_maps(WIDTH, sorts)
    site = SiteMaps(len(maps) + 2, WIDTH, CPU)
    site.allocate_all_parts()
    for slot, each in maps.items():
        site.put(slot, each)
    return site


@pytest.fixture(params=["torch", "operator", "kernel"])
def edit(request: pytest.FixtureRequest) -> tuple[RoutedEdit, bool]:
    """Return a way to edit, and whether it expects a column for each row."""
    match request.param:
        case "torch":
            return edit_in_place, False
        case "operator":
            return routed_edit, False
        case _:
            if not INTERPRETED:
                pytest.skip("Triton does not interpret kernels here")
            from steering.kernels.affine_triton import (  # noqa: PLC0415  Triton may lack
                edit_in_place_triton,
            )

            return edit_in_place_triton, True


@pytest.mark.parametrize("sorts", [(PLAIN,), (PLAIN, GATED), (SUPPORTED, PLAIN), (BOTH,), SORTS])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_step_gives_what_edits_of_a_copy_give(
    edit: tuple[RoutedEdit, bool], sorts: tuple[Sort, ...], depth: int
) -> None:
    """Also where some rows are not edited, and some slots have no map at the site."""
    site = site_of(sorts)
    batch = random_batch(site.table, ROWS, depth)
    batch.slots[:, 2] = 0
    step = step_of(batch, site, dense=edit[1])
    expected = edit_stacks(batch.activations, batch.slots, batch.strength, site.table, None)
    found = step.edited(edit[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found, by_oracle(batch, random_maps(WIDTH, sorts))[0], rtol=1e-5, atol=1e-4
    )
    assert not step.tensors.doses.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[1] * ROWS, [1, 2, 1, 2, 2, 1, 1], [0, 1, 0, 0, 2, 1, 0]])
def test_the_operator_skips_what_no_row_needs_without_changing_a_bit(
    dtype: torch.dtype, slots: list[int]
) -> None:
    site = site_of((PLAIN, PLAIN))
    batch = random_batch(site.table, ROWS, 1, dtype)
    batch.slots[0] = torch.tensor(slots)
    step = step_of(batch, site, dense=False)
    assert int(step.used_flags) & ALL_MAPPED
    expected = edit_stacks(batch.activations, batch.slots, batch.strength, site.table, None)
    assert torch.equal(bits_of(step.edited(routed_edit)), bits_of(expected))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter, about NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rows_without_an_edit_keep_their_bits(
    edit: tuple[RoutedEdit, bool], dtype: torch.dtype, depth: int
) -> None:
    site = site_of((PLAIN,))
    slots = torch.zeros(depth, ROWS, dtype=torch.int64)
    slots[-1:, 3] = 1
    rows = odd_rows(ROWS, WIDTH, dtype, CPU).clone()
    rows[3] = 1.0
    batch = Batch(rows, slots, torch.ones(depth, ROWS), site.table)
    found = step_of(batch, site, dense=edit[1]).edited(edit[0])
    is_same = (bits_of(found) == bits_of(rows)).all(dim=1)
    assert is_same.tolist() == [row != 3 or not depth for row in range(ROWS)]


def test_a_site_where_no_slot_in_use_has_a_map_is_left_alone(edit: tuple[RoutedEdit, bool]) -> None:
    site = site_of((PLAIN,))
    batch = random_batch(site.table, ROWS, 2)
    batch.slots[:] = 2
    assert torch.equal(step_of(batch, site, dense=edit[1]).edited(edit[0]), batch.activations)


@pytest.mark.parametrize("depth", [1, 3])
def test_measuring_tells_the_doses_and_changes_no_bit(
    edit: tuple[RoutedEdit, bool], depth: int
) -> None:
    """Two sites add their doses; only edited rows have any."""
    site = site_of(SORTS)
    batch = random_batch(site.table, ROWS, depth)
    batch.slots[:, 2] = 0
    plain = step_of(batch, site, dense=edit[1]).edited(edit[0])
    step = step_of(batch, site, dense=edit[1], is_measured=True)
    for _ in range(2):
        assert torch.equal(bits_of(step.edited(edit[0])), bits_of(plain))
    expected = 2 * by_oracle(batch, random_maps(WIDTH))[1]
    columns = int(step.tensors.extent[1])
    found = torch.zeros(2, depth, ROWS)
    found[:, :, step.tensors.rows[:columns]] = step.tensors.doses[:, :depth, :columns]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert step.tensors.doses.count_nonzero() == expected.count_nonzero()
    if not edit[1]:
        assert (step.tensors.seconds > 0).all()


@pytest.mark.parametrize("edited", [0, 3])
@pytest.mark.parametrize("edit", [edit_in_place, routed_edit])
def test_columns_that_are_only_measured_leave_their_rows(edit: RoutedEdit, edited: int) -> None:
    site = site_of(SORTS)
    batch = random_batch(site.table, ROWS, 2)
    step = step_of(batch, site, dense=False, is_measured=True)
    right = step.edited(edit)
    doses = step.tensors.doses.clone()
    step.tensors.doses.zero_()
    step.tensors.seconds.zero_()
    step.tensors.extent[4] = edited
    found = step.edited(edit)
    rows = step.tensors.rows[:edited]
    expected = batch.activations.index_copy(0, rows, right[rows])
    assert torch.equal(found, expected)
    assert torch.equal(step.tensors.doses, doses)
    editing, measuring = step.tensors.seconds.tolist()
    assert measuring > 0
    assert (editing > 0) == (edited > 0)


def test_rows_that_lie_apart_are_edited_where_they_are(edit: tuple[RoutedEdit, bool]) -> None:
    site = site_of((PLAIN, GATED))
    batch = random_batch(site.table, ROWS, 2)
    expected = step_of(batch, site, dense=edit[1]).edited(edit[0])
    wide = torch.full((ROWS, WIDTH + 5), 3.0)
    wide[:, 2 : 2 + WIDTH] = batch.activations
    step = step_of(batch, site, dense=edit[1])
    edit[0](wide[:, 2 : 2 + WIDTH], step.tensors, step.used_flags, site.table)
    assert torch.equal(wide[:, 2 : 2 + WIDTH], expected)
    assert (wide[:, :2] == 3).all()
    assert (wide[:, 2 + WIDTH :] == 3).all()


@pytest.mark.parametrize("is_measured", [False, True])
def test_the_operator_keeps_torch_s_rules(is_measured: bool) -> None:
    site = site_of(SORTS)
    batch = random_batch(site.table, ROWS, 2)
    step = step_of(batch, site, dense=False, is_measured=is_measured)
    torch.library.opcheck(
        torch.ops.steerserve.routed_edit.default,
        (batch.activations, *step.tensors, step.used_flags, *site.table),
        test_utils=("test_schema", "test_faketensor"),
    )
