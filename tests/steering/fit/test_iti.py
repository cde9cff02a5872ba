"""Tests of ITI: the heads that are chosen, their shifts, and data that tells nothing apart."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.fit import FitError
from steering.fit.iti import DirectionName, ItiSettings, fit_iti
from steering.fit.logistic import fit_logistic

HEADS, HEAD_WIDTH, LAYERS = 3, 4, 4
SITES = tuple(f"layers.{layer}.o_proj.input" for layer in range(LAYERS))
PLANTED = {(0, 1): 5.0, (2, 0): 4.0, (3, 2): 6.0}  # (layer, head) -> how far the sides are apart


def _outputs(count: int, seed: int, planted: Mapping[tuple[int, int], float]) -> dict[str, Tensor]:
    """Outputs of heads, of which the planted ones lie elsewhere."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(LAYERS, count, HEADS, HEAD_WIDTH, generator=random)
    for (layer, head), apart in planted.items():
        states[layer, :, head, 1] += apart
    return {site: states[layer].flatten(1) for layer, site in enumerate(SITES)}


SOURCE, TARGET = _outputs(30, 1, {}), _outputs(40, 2, PLANTED)


def _head(states: Mapping[str, Tensor], layer: int, head: int) -> Tensor:
    return states[SITES[layer]].view(-1, HEADS, HEAD_WIDTH)[:, head].double()


@pytest.mark.parametrize("direction", ["probe", "mean"])
def test_the_heads_that_tell_most_are_shifted_by_sigma_theta(direction: DirectionName) -> None:
    settings = ItiSettings(heads=3, direction=direction)
    maps, report = fit_iti(SOURCE, TARGET, HEADS, settings)
    assert list(maps) == [SITES[0], SITES[2], SITES[3]]
    for layer, site in enumerate(SITES):
        for head in range(HEADS):
            if (layer, head) not in PLANTED:
                if site in maps:
                    assert not maps[site].bias.view(HEADS, -1)[head].any()
                continue
            shift = maps[site].bias.view(HEADS, -1)[head].double()
            away, towards = _head(SOURCE, layer, head), _head(TARGET, layer, head)
            theta = shift / shift.norm()
            along = torch.cat([away, towards]) @ theta
            assert shift.norm().item() == pytest.approx(np.std(along.numpy()), rel=1e-5)
            difference = towards.mean(0) - away.mean(0)
            assert (theta @ difference).item() > 0.9 * difference.norm().item()
            if direction == "mean":
                torch.testing.assert_close(theta, difference / difference.norm())
    assert all(torch.equal(map_.weight, torch.ones(HEADS * HEAD_WIDTH)) for map_ in maps.values())
    assert (report.shifted_heads, report.all_heads) == (3, LAYERS * HEADS)
    assert 0.8 < report.worst_accuracy <= report.mean_accuracy <= report.best_accuracy <= 1


def test_a_probe_learns_from_the_sentences_that_are_not_held_out() -> None:
    """The direction is the probe's of some 24 + 32 sentences; held-out ones do not move it."""
    settings = ItiSettings(heads=3)
    maps, _ = fit_iti(SOURCE, TARGET, HEADS, settings)
    changed_nothing = 0
    for row in range(30):
        changed = {site: states.clone() for site, states in SOURCE.items()}
        changed[SITES[0]][row] += 0.1
        shift = fit_iti(changed, TARGET, HEADS, settings)[0][SITES[0]].bias
        theta, other = (each / each.norm() for each in (maps[SITES[0]].bias, shift))
        changed_nothing += bool((theta - other).abs().max() < 1e-6)
    assert changed_nothing == 30 * 0.2


def test_the_direction_is_the_normal_of_a_probe_fitted_alone() -> None:
    """A side with many equal sentences: whichever are held out, the probe is the same."""
    away, towards = torch.randn(1, HEADS * HEAD_WIDTH), torch.randn(1, HEADS * HEAD_WIDTH)
    source, target = {"a": away.repeat(10, 1)}, {"a": towards.repeat(20, 1)}
    maps, report = fit_iti(source, target, HEADS, ItiSettings())
    shifts = maps["a"].bias.view(HEADS, -1)
    for head in range(HEADS):
        alone = fit_logistic(
            away.view(HEADS, -1)[head].repeat(1, 8, 1).double(),
            towards.view(HEADS, -1)[head].repeat(1, 16, 1).double(),
        )
        theta = torch.nn.functional.normalize(alone.weights[0], dim=0).float()
        torch.testing.assert_close(shifts[head] / shifts[head].norm(), theta)
    assert report.shifted_heads == HEADS  # fewer than asked for


def test_of_equally_accurate_heads_those_with_lower_losses_are_shifted() -> None:
    source = {site: torch.zeros(10, 1) for site in ("a", "b", "c")}
    target = {
        site: torch.full((10, 1), value) for site, value in zip("abc", (1, 9, 3), strict=True)
    }
    maps, report = fit_iti(source, target, 1, ItiSettings(heads=1))
    assert list(maps) == ["b"]
    assert (report.best_accuracy, report.worst_accuracy) == (1, 1)


def test_progress_is_told_and_a_seed_repeats() -> None:
    done: list[tuple[int, int]] = []
    maps, _ = fit_iti(SOURCE, TARGET, HEADS, ItiSettings(), lambda *each: done.append(each))
    assert done == [(site, LAYERS) for site in range(1, LAYERS + 1)]
    again, _ = fit_iti(SOURCE, TARGET, HEADS, ItiSettings())
    other, _ = fit_iti(SOURCE, TARGET, HEADS, ItiSettings(seed=1))
    assert all(torch.equal(map_.bias, again[site].bias) for site, map_ in maps.items())
    assert any(not torch.equal(map_.bias, other[site].bias) for site, map_ in maps.items())


def test_heads_without_variation_are_left_alone() -> None:
    source, target = ({"a": each["a"].clone()} for each in _constant_but_for_one_head())
    maps, report = fit_iti(source, target, HEADS, ItiSettings())
    assert report.shifted_heads == 1
    shifts = maps["a"].bias.view(HEADS, -1)
    assert shifts[1].any()
    assert not shifts[[0, 2]].any()


def _constant_but_for_one_head() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source, target = torch.zeros(6, HEADS * HEAD_WIDTH), torch.zeros(6, HEADS * HEAD_WIDTH)
    target[:, HEAD_WIDTH : 2 * HEAD_WIDTH] = 1
    return {"a": source}, {"a": target}


def test_equal_sides_give_finite_maps() -> None:
    maps, _ = fit_iti(SOURCE, SOURCE, HEADS, ItiSettings())
    assert all(map_.bias.isfinite().all() for map_ in maps.values())


@pytest.mark.parametrize(
    ("source", "target", "heads", "message"),
    [
        ({}, {}, 1, "no site"),
        ({"a": torch.ones(1, 4)}, {"a": torch.ones(5, 4)}, 2, "2 sentences in the source"),
        ({"a": torch.ones(5, 4)}, {"a": torch.ones(0, 4)}, 2, "2 sentences in the target"),
        ({"a": torch.rand(5, 4)}, {"a": torch.rand(5, 4)}, 3, "no multiple of the model's 3"),
        ({"a": torch.zeros(5, 4)}, {"a": torch.zeros(5, 4)}, 2, "are the two files different"),
        ({"a": torch.full((5, 4), torch.inf)}, {"a": torch.ones(5, 4)}, 2, "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    source: dict[str, Tensor], target: dict[str, Tensor], heads: int, message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit_iti(source, target, heads, ItiSettings())


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 0), ("held_out", 0.0), ("held_out", 1.0), ("seed", -1), ("direction", "pca")],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(FitError, match=field):
        replace(ItiSettings(), **{field: value})
