"""Tests of a request's settings: defaults are filled in, and wrong ones refused with a reason."""

import math

import pytest

from interventions.request_settings import Caps, InvalidSettingError, resolve_settings
from steering.settings import AffineSettings, RewardSettings
from tests.artifact_samples import affine_manifest, reward_manifest


def _refusal(
    kind: str, requested: dict[str, object], caps: Caps | None = None
) -> InvalidSettingError:
    manifest = affine_manifest() if kind == "affine" else reward_manifest()
    with pytest.raises(InvalidSettingError) as caught:
        resolve_settings(manifest, requested, caps or Caps())
    assert str(caught.value) == caught.value.message
    return caught.value


def test_defaults_are_the_manifests() -> None:
    assert resolve_settings(affine_manifest(), {}, Caps()) == AffineSettings(0.5, "all")
    assert resolve_settings(reward_manifest(), {}, Caps()) == RewardSettings(0.5, 5, 1.0)


def test_what_is_requested_replaces_its_default_only() -> None:
    assert resolve_settings(affine_manifest(), {"strength": 1}, Caps()) == AffineSettings(1.0)
    assert resolve_settings(
        affine_manifest(), {"positions": "generated"}, Caps()
    ) == AffineSettings(0.5, "generated")
    assert resolve_settings(
        reward_manifest(), {"iterations": 0, "eta": 2}, Caps()
    ) == RewardSettings(2.0, 0, 1.0)


def test_numbers_become_floats() -> None:
    settings = resolve_settings(affine_manifest(), {"strength": 1}, Caps())
    assert isinstance(settings, AffineSettings)
    assert type(settings.strength) is float


@pytest.mark.parametrize(
    ("kind", "field", "nearest"),
    [
        ("affine", "strenght", "strength"),
        ("affine", "position", "positions"),
        ("reward", "iteration", "iterations"),
        ("reward", "direction-scale", "direction_scale"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_nearest(
    kind: str, field: str, nearest: str
) -> None:
    refusal = _refusal(kind, {field: 1})
    assert refusal.field == field
    assert f'did you mean "{nearest}"?' in refusal.message


def test_an_unknown_setting_is_refused_with_what_there_is() -> None:
    refusal = _refusal("affine", {"zzz": 1})
    assert '"strength", "positions"' in refusal.message


@pytest.mark.parametrize(
    ("kind", "field", "other"),
    [
        ("affine", "eta", "reward"),
        ("affine", "iterations", "reward"),
        ("affine", "direction_scale", "reward"),
        ("reward", "strength", "affine"),
        ("reward", "positions", "affine"),
    ],
)
def test_a_setting_of_the_other_kind_is_refused(kind: str, field: str, other: str) -> None:
    refusal = _refusal(kind, {field: 1})
    assert refusal.field == field
    assert f"setting of {other} interventions" in refusal.message


@pytest.mark.parametrize(
    "value", [True, False, "0.5", None, [0.5], {}, math.nan, math.inf, -math.inf]
)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("affine", "strength"),
        ("reward", "eta"),
        ("reward", "iterations"),
        ("reward", "direction_scale"),
    ],
)
def test_what_is_no_finite_number_is_refused(kind: str, field: str, value: object) -> None:
    refusal = _refusal(kind, {field: value})
    assert refusal.field == field
    assert "must be" in refusal.message


@pytest.mark.parametrize("value", [5.0, 2.5])
def test_iterations_are_an_integer(value: float) -> None:
    assert "must be an integer" in _refusal("reward", {"iterations": value}).message


@pytest.mark.parametrize("value", ["some", "", "ALL", 1, None, True, ["all"]])
def test_positions_are_one_of_three(value: object) -> None:
    refusal = _refusal("affine", {"positions": value})
    assert refusal.field == "positions"
    assert '"all", "prompt", "generated"' in refusal.message


@pytest.mark.parametrize(
    ("kind", "field", "value", "shown"),
    [
        ("affine", "strength", 1.0001, "[0, 1]"),
        ("affine", "strength", -0.1, "[0, 1]"),
        ("affine", "strength", 10**400, "[0, 1]"),
        ("affine", "strength", -(10**400), "[0, 1]"),
        ("reward", "eta", 2.1, "[0, 2]"),
        ("reward", "iterations", 11, "[0, 10]"),
        ("reward", "iterations", -1, "[0, 10]"),
        ("reward", "direction_scale", 3.5, "[0, 3]"),
    ],
)
def test_out_of_range_is_refused_with_the_range(
    kind: str, field: str, value: float, shown: str
) -> None:
    refusal = _refusal(kind, {field: value})
    assert refusal.field == field
    assert shown in refusal.message


def test_both_ends_of_the_range_are_allowed() -> None:
    for strength in (0, 1):
        resolve_settings(affine_manifest(), {"strength": strength}, Caps())
    for iterations in (0, 10):
        resolve_settings(reward_manifest(), {"iterations": iterations}, Caps())


def test_the_servers_caps_narrow_the_manifests_limits() -> None:
    caps = Caps(strength=(-1, 0.75), iterations=(0, 4), eta=(0, 1), direction_scale=(0, 2))
    assert "[0, 0.75]" in _refusal("affine", {"strength": 0.8}, caps).message
    assert "[0, 4]" in _refusal("reward", {"iterations": 5}, caps).message
    assert "[0, 1]" in _refusal("reward", {"iterations": 1, "eta": 1.5}, caps).message
    scale: dict[str, object] = {"iterations": 1, "direction_scale": 2.5}
    assert "[0, 2]" in _refusal("reward", scale, caps).message


def test_a_default_outside_of_the_caps_is_refused_not_changed() -> None:
    refusal = _refusal("affine", {}, Caps(strength=(0, 0.25)))
    assert refusal.field == "strength"
    assert "[0, 0.25]" in refusal.message


def test_limits_and_caps_without_common_values() -> None:
    refusal = _refusal("affine", {"strength": 0.5}, Caps(strength=(2, 3)))
    assert "[0, 1]" in refusal.message
    assert "[2, 3]" in refusal.message


def test_a_manifest_with_negative_limits() -> None:
    manifest = affine_manifest(limits={"strength": [-20, 20]})
    assert resolve_settings(manifest, {"strength": -20}, Caps()) == AffineSettings(-20.0)
    wide = affine_manifest(limits={"strength": [-1000, 1000]})
    with pytest.raises(InvalidSettingError, match=r"\[-100, 100\]"):
        resolve_settings(wide, {"strength": 101}, Caps())
