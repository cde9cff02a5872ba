"""Tests affine edits of tokens by maps, which are stacked by slot, against slow references."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steering.affine import AffineMap, edit_stacks, edit_tokens
from steering.kernels.affine_edit import affine_edit
from steering.settings import AffineSettings
from steering.site_maps import SiteMaps
from tests import oracles
from tests.tiny import WIDTH, random_maps

CPU = torch.device("cpu")


def maps_of(*maps: AffineMap, width: int = WIDTH) -> SiteMaps:
    """Return a site's maps, in slots from 1 on."""
    site = SiteMaps(len(maps) + 1, width, CPU)
    for slot, each in enumerate(maps, 1):
        site.put(slot, each)
    return site


def edited_by(site_map: AffineMap, z: Tensor, strength: float = 1.0) -> Tensor:
    """Return z with every row edited by one map."""
    slots = torch.ones(len(z), dtype=torch.int64)
    maps = maps_of(site_map, width=z.shape[1])
    return edit_tokens(z, slots, torch.full((len(z),), strength), maps.table)


@given(
    seed=st.integers(0, 10_000),
    strength=st.floats(-2, 2),
    support=st.booleans(),
    gate=st.booleans(),
)
def test_an_edit_equals_the_formula_of_the_papers(
    seed: int, strength: float, support: bool, gate: bool
) -> None:
    site_map = random_maps(seed, sites=("site",), support=support, gate=gate)["site"]
    z = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([oracles.affine(row, site_map, strength) for row in z])
    torch.testing.assert_close(edited_by(site_map, z, strength), expected, rtol=1e-5, atol=1e-5)


def test_the_fast_reference_equals_the_slow_one() -> None:
    site_map = random_maps(1, sites=("site",), support=True, gate=True)["site"]
    z = torch.randn(4, WIDTH)
    expected = torch.stack([oracles.affine(row, site_map, 0.7) for row in z])
    torch.testing.assert_close(oracles.affine_rows(z, site_map, 0.7), expected)


def test_a_coordinate_outside_the_support_keeps_its_bits() -> None:
    ones = torch.ones(4)
    z = torch.tensor([[-1.5, -1.0, 1.0, 1.5]])
    edited = edited_by(AffineMap(2 * ones, ones, low=-ones, high=ones), z)
    assert edited.tolist() == [[-1.5, -1.0, 3.0, 1.5]]


def test_a_map_gives_the_same_bits_beside_maps_that_have_more() -> None:
    """Maps with a support or a gate in other slots do not change a plain map's bits."""
    plain = random_maps(1, sites=("site",))["site"]
    gated = random_maps(2, sites=("site",), gate=True)["site"]
    supported = random_maps(3, sites=("site",), support=True)["site"]
    z = 2 * torch.randn(5, WIDTH)
    slots, strength = torch.ones(5, dtype=torch.int64), torch.rand(5)
    alone = edit_tokens(z, slots, strength, maps_of(plain).table)
    beside = edit_tokens(z, slots, strength, maps_of(plain, gated, supported).table)
    assert torch.equal(alone, beside)


def test_a_gate_sees_what_the_edits_before_it_have_left() -> None:
    first = random_maps(1, sites=("site",))["site"]
    gated = random_maps(2, sites=("site",), gate=True)["site"]
    z = torch.randn(1, WIDTH)
    slots = torch.tensor([[1], [2]])
    edited = edit_stacks(z, slots, torch.ones(2, 1), maps_of(first, gated).table, None)
    expected = oracles.affine(oracles.affine(z[0], first, 1.0), gated, 1.0)
    torch.testing.assert_close(edited[0], expected)


def test_a_slot_that_is_filled_again_forgets_its_gate() -> None:
    gated = random_maps(2, sites=("site",), gate=True)["site"]
    maps = maps_of(gated)
    maps.clear(1)
    maps.put(1, replace(gated, gate=None))
    z = torch.randn(2, WIDTH)
    edited = edit_tokens(z, torch.tensor([1, 1]), torch.ones(2), maps.table)
    expected = torch.stack([oracles.affine(row, replace(gated, gate=None), 1.0) for row in z])
    torch.testing.assert_close(edited, expected)


@pytest.mark.parametrize("doses", [False, True])
def test_the_operator_keeps_torch_s_rules(doses: bool) -> None:
    """torch's own check covers the operator's schema, its fake shapes and its in-place changes."""
    table = maps_of(*random_maps(1, support=True, gate=True).values()).table
    z = torch.randn(4, WIDTH).bfloat16()
    slots = torch.tensor([[0, 1, 2, 1], [1, 0, 0, 2]])
    measured = torch.zeros(2, 2, 4) if doses else None
    torch.library.opcheck(
        torch.ops.steerserve.affine_edit.default,
        (z, slots, torch.rand(2, 4), *table, measured),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiler_leaves_the_operator_whole() -> None:
    table = maps_of(*random_maps(1, gate=True).values()).table
    z, slots, strength = torch.randn(3, WIDTH), torch.tensor([[0, 1, 2]]), torch.rand(1, 3)
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(affine_edit, backend=backend, fullgraph=True)
    assert torch.equal(compiled(z, slots, strength, table), affine_edit(z, slots, strength, table))
    assert seen == [torch.ops.steerserve.affine_edit]


@pytest.mark.parametrize(
    ("strength", "nothing"), [(0.0, True), (-0.0, True), (1e-60, True), (1e-9, False)]
)
def test_only_a_strength_that_is_zero_in_float32_does_nothing(
    strength: float, nothing: bool
) -> None:
    assert AffineSettings(strength).does_nothing is nothing
