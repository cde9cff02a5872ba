"""Tests the kernel for affine edits on a GPU, without an engine.

Each token is edited by a stack of maps, given by their slots in a table.
"""

import importlib
import os
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from steering.affine import edit_stacks
from steering.kernels.routed_edit import StepTensors
from tests.affine_batches import (
    Batch,
    bits_of,
    by_oracle,
    odd_rows,
    random_batch,
    random_maps,
    table_of,
)
from tests.cuda.devices import DEVICE, GPU, MARKS

pytestmark = MARKS

Edit: TypeAlias = Callable[[Batch, Tensor | None], Tensor]
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter multiplies bfloat16 numbers as integers, so bfloat16 is left out there.
DTYPES = [torch.float32, torch.float16, *(() if INTERPRETED else (torch.bfloat16,))]
# Widths of SmolLM2, Llama 8B and 70B, Llama 8B's MLP, and an odd one.
WIDTHS, TOKENS = ((576, 4096, 8192, 14336, 1001), 300) if GPU else ((32, 100), 7)
ULP = {torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def plainly(batch: Batch, doses: Tensor | None) -> Tensor:
    return edit_stacks(batch.activations, batch.slots, batch.strength, batch.table, doses)


@pytest.fixture
def edit() -> Edit:
    """Return the kernel or, in a dry run without Triton's interpreter, torch's operators."""
    if not (GPU or INTERPRETED):
        return plainly
    kernel = importlib.import_module("steering.kernels.affine_triton").edit_stacks_triton
    return lambda batch, doses: kernel(
        batch.activations, batch.slots, batch.strength, batch.table, doses
    )


def share_that_differs(found: Tensor, expected: Tensor) -> float:
    """Return the share of coordinates that differ by more than rounding.

    Callers allow a few, because rounding may move a value across the bound of a support.
    """
    ulp = ULP[expected.dtype]
    close = torch.isclose(found.float(), expected.float(), rtol=2 * ulp, atol=10 * ulp)
    return 1 - float(close.float().mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_stacks_of_all_sorts_of_maps_are_right(edit: Edit, width: int, dtype: torch.dtype) -> None:
    """Edits and doses of a mixed batch are right, and asking for doses does not change edits."""
    maps = random_maps(width)
    batch = random_batch(table_of(maps, DEVICE), TOKENS, 4, dtype)
    doses, plain_doses = batch.new_doses(), batch.new_doses()
    found, expected = edit(batch, doses), plainly(batch, plain_doses)
    assert share_that_differs(found, expected) <= 1e-5
    torch.testing.assert_close(doses, plain_doses, rtol=1e-3, atol=1e-3)
    assert torch.equal(bits_of(edit(batch, None)), bits_of(found))
    few = batch.tokens(slice(4))
    assert share_that_differs(found[:4].cpu(), by_oracle(few, maps)[0]) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_has_the_same_bits_in_every_batch(
    edit: Edit, width: int, dtype: torch.dtype
) -> None:
    """A token's bits do not depend on the other tokens, nor on its rows' strides and alignment."""
    batch = random_batch(table_of(random_maps(width), DEVICE), TOKENS, 3, dtype)
    found = bits_of(edit(batch, None))
    for which in (slice(1), slice(5, 6), slice(1, TOKENS)):
        assert torch.equal(bits_of(edit(batch.tokens(which), None)), found[which])
    for first, apart in ((0, 64), (1, 7)):
        rows = torch.zeros(TOKENS, width + apart, dtype=dtype, device=DEVICE)
        rows = rows[:, first : first + width].copy_(batch.activations)
        views = Batch(rows, batch.slots, batch.strength, batch.table)
        assert torch.equal(bits_of(edit(views, None)), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_without_a_map_keeps_its_bits(edit: Edit, dtype: torch.dtype) -> None:
    if not (GPU or INTERPRETED):
        pytest.skip("plain arithmetic casts them")
    maps = random_maps(WIDTHS[0])
    rows = odd_rows(4, WIDTHS[0], dtype, DEVICE).clone()
    rows[3] = 1.0
    slots = torch.tensor([[0, max(maps) + 1, 0, 1]] * 2, device=DEVICE)
    batch = Batch(rows, slots, torch.ones(2, 4, device=DEVICE), table_of(maps, DEVICE))
    found = edit(batch, None)
    assert torch.equal(bits_of(found)[:3], bits_of(rows)[:3])
    assert not torch.equal(bits_of(found)[3], bits_of(rows)[3])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_follows_slots_and_strengths_in_its_buffers(edit: Edit, dtype: torch.dtype) -> None:
    """A replay with other activations, slots, strengths and maps gives the bits of a launch."""
    table = table_of(random_maps(WIDTHS[0]), DEVICE)
    captured = random_batch(table, 16, 4, dtype)
    # Views of larger buffers, like the inputs of an engine's graphs.
    slots = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)[:, :16]
    strength = torch.zeros(4, 64, device=DEVICE)[:, :16]
    static = Batch(torch.zeros_like(captured.activations), slots, strength, table)
    doses = torch.zeros(2, 4, 64, device=DEVICE)[:, :, :16]
    edit(static, doses)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = edit(static, doses)
    seen = []
    for seed in range(4):
        batch = random_batch(table, 16, 4, dtype, seed)
        for name in ("activations", "slots", "strength"):
            getattr(static, name).copy_(getattr(batch, name))
        expected_doses = batch.new_doses()
        expected = edit(batch, expected_doses)
        doses.zero_()
        graph.replay()
        assert torch.equal(bits_of(found), bits_of(expected))
        assert torch.equal(doses, expected_doses)
        seen.append(found.clone())
        table.bias.mul_(2)  # as if other maps were loaded into the slots
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_of_an_edit_in_place_follows_the_step(dtype: torch.dtype) -> None:
    """A replay edits as deep, as many rows, and with doses or not, as the step's tensors say."""
    if not (GPU or INTERPRETED):
        pytest.skip("there is no kernel to be captured")
    kernels = importlib.import_module("steering.kernels.affine_triton")
    table = table_of(random_maps(WIDTHS[0]), DEVICE)
    rows, columns = 16, 24
    activations = torch.zeros(rows, WIDTHS[0], dtype=dtype, device=DEVICE)
    step = StepTensors(
        extent=torch.zeros(5, dtype=torch.int64, device=DEVICE),
        rows=torch.zeros(columns, dtype=torch.int64, device=DEVICE),
        slots=torch.zeros(4, columns, dtype=torch.int64, device=DEVICE),
        strength=torch.zeros(4, columns, device=DEVICE),
        doses=torch.zeros(2, 4, columns, device=DEVICE),
        seconds=torch.zeros(2, dtype=torch.float64, device=DEVICE),
    )
    used_flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def edit() -> None:
        kernels.edit_in_place_triton(activations, step, used_flags, table)

    replay = edit
    if GPU:
        edit()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            edit()
        replay = graph.replay
    for seed, (depth, edited, is_measured) in enumerate(
        ((0, 0, False), (4, rows, True), (1, 5, False), (2, rows, False))
    ):
        batch = random_batch(table, rows, max(depth, 1), dtype, seed)
        doses = batch.new_doses()
        expected = batch.activations.clone()
        if depth:
            few = batch.tokens(slice(edited))
            found_doses = doses[:, :, :edited] if is_measured else None
            expected[:edited] = kernels.edit_stacks_triton(
                few.activations, few.slots, few.strength, table, found_doses
            )
        activations.copy_(batch.activations)
        step.extent.copy_(torch.tensor([depth, edited, 0, is_measured, edited]))
        step.slots[:depth, :rows] = batch.slots[:depth]
        step.strength[:depth, :rows] = batch.strength[:depth]
        step.doses.zero_()
        replay()
        assert torch.equal(bits_of(activations), bits_of(expected))
        assert torch.equal(step.doses[:, :depth, :rows], doses[:, :depth])
        assert step.doses.any() == is_measured


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_steps_of_all_shapes_share_one_kernel(edit: Edit) -> None:
    """No shape of a step compiles another kernel, which requests would have to wait for."""
    kernel = importlib.import_module("steering.kernels.affine_triton")._edit_kernel
    table = table_of(random_maps(640), DEVICE)
    kernels = kernel.device_caches[DEVICE.index][0]
    before = len(kernels)
    for tokens, depth in ((1, 1), (16, 1), (300, 4), (17, 2)):
        batch = random_batch(table, tokens, depth, torch.bfloat16)
        edit(batch, None)
        edit(batch.tokens(slice(1, None)), None)
        edit(batch, batch.new_doses())
    plain = table_of({1: random_maps(640)[1]}, DEVICE)
    edit(random_batch(plain, 5, 1, torch.bfloat16), None)
    assert len(kernels) == before + 2
