import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.affine import AffineMap, apply_affine
from steering.settings import AffineSettings
from tests import oracles
from tests.tiny import WIDTH, random_maps


@given(seed=st.integers(0, 10_000), strength=st.floats(-2, 2), support=st.booleans())
def test_apply_affine_equals_the_formula_of_the_paper(
    seed: int, strength: float, support: bool
) -> None:
    site_map = random_maps(seed, sites=("site",), support=support)["site"]
    z = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
    edited = apply_affine(
        z,
        site_map.weight[None] - 1,
        site_map.bias[None],
        torch.full((3, 1), strength),
        None if site_map.low is None else site_map.low[None],
        None if site_map.high is None else site_map.high[None],
    )
    expected = torch.stack([oracles.affine(row, site_map, strength) for row in z])
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5)


def test_the_fast_reference_equals_the_slow_one() -> None:
    site_map = random_maps(1, sites=("site",), support=True)["site"]
    z = torch.randn(4, WIDTH)
    expected = torch.stack([oracles.affine(row, site_map, 0.7) for row in z])
    torch.testing.assert_close(oracles.affine_rows(z, site_map, 0.7), expected)


def test_a_coordinate_outside_the_support_keeps_its_bits() -> None:
    ones = torch.ones(4)
    site_map = AffineMap(2 * ones, ones, low=-ones, high=ones)
    z = torch.tensor([[-1.5, -1.0, 1.0, 1.5]])
    assert site_map.low is not None
    assert site_map.high is not None
    edited = apply_affine(
        z, site_map.weight[None] - 1, site_map.bias[None], ones[:1, None], -ones[None], ones[None]
    )
    assert edited.tolist() == [[-1.5, -1.0, 3.0, 1.5]]


@pytest.mark.parametrize(
    ("strength", "nothing"), [(0.0, True), (-0.0, True), (1e-60, True), (1e-9, False)]
)
def test_only_a_strength_that_is_zero_in_float32_does_nothing(
    strength: float, nothing: bool
) -> None:
    assert AffineSettings(strength).does_nothing is nothing
