"""Tests of the manifest: what is read, what is refused, and that a refusal names the field."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from interventions.manifest import (
    DIGEST_PATTERN,
    NAME_PATTERN,
    AffineManifest,
    ManifestError,
    RewardManifest,
    manifest_text,
    parse_manifest,
)
from tests.artifact_samples import Json, affine_manifest, manifest_fields, reward_manifest

DELETED = object()


def _changed(fields: Json, place: str, value: object) -> Json:
    """Return a deep copy of `fields` with the field at `place` set, or deleted."""
    changed: Json = json.loads(json.dumps(fields))
    *parents, last = place.split(".")
    target = changed
    for parent in parents:
        inner = target[parent]
        assert isinstance(inner, dict)
        target = inner
    if value is DELETED:
        del target[last]
    else:
        target[last] = value
    return changed


def test_reads_an_affine_manifest() -> None:
    manifest = parse_manifest(json.dumps(manifest_fields("affine", "detox-lineas")))

    assert isinstance(manifest, AffineManifest)
    assert manifest.name == "detox-lineas"
    assert manifest.defaults.strength == 0.5
    assert manifest.defaults.positions == "all"
    assert manifest.limits.strength == (0.0, 1.0)
    assert manifest.created == datetime(2026, 11, 21, 20, 41, tzinfo=UTC)
    assert manifest.base_model.hidden_size == 4
    assert manifest.training == {
        "data": "made up",
        "samples": 32,
        "loss": 0.25,
        "shuffled": True,
        "x": None,
    }
    assert manifest.training["shuffled"] is True


def test_reads_a_reward_manifest() -> None:
    manifest = parse_manifest(json.dumps(manifest_fields("reward")))

    assert isinstance(manifest, RewardManifest)
    assert (manifest.defaults.eta, manifest.defaults.iterations) == (0.5, 5)
    assert manifest.limits.iterations == (0, 10)


def test_limits_have_the_documented_defaults() -> None:
    assert affine_manifest(limits={}).limits.strength == (0.0, 1.0)
    limits = reward_manifest(limits={"eta": [-1, 1]}).limits
    assert limits.eta == (-1.0, 1.0)
    assert limits.iterations == (0, 64)
    assert limits.direction_scale == (0.0, 10.0)


def test_fingerprint_may_be_left_out() -> None:
    fields = _changed(manifest_fields(), "base_model.fingerprint", DELETED)
    assert parse_manifest(json.dumps(fields)).base_model.fingerprint is None


@pytest.mark.parametrize("kind", ["affine", "reward"])
def test_text_reads_back_as_the_same_manifest(kind: str) -> None:
    manifest = parse_manifest(json.dumps(manifest_fields(kind)))
    assert parse_manifest(manifest_text(manifest)) == manifest


def test_negative_strength_where_the_manifest_allows_it() -> None:
    manifest = affine_manifest(limits={"strength": [-20, 20]}, defaults={"strength": -4})
    assert manifest.defaults.strength == -4.0


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "steerserve/2"),
        ("format", DELETED),
        ("kind", "vector"),
        ("kind", DELETED),
        ("kind", ["affine"]),
        ("method", "Not A Slug"),
        ("name", "../x"),
        ("name", "UPPER"),
        ("name", "x\n"),
        ("name", ""),
        ("name", "a" * 65),
        ("name", 5),
        ("description", DELETED),
        ("created", "2026-11-21T20:41:00"),
        ("created", "2026-11-21"),
        ("created", "1700000000"),
        ("created", 1700000000),
        ("created", "2026-13-21T20:41:00Z"),
        ("license", None),
        ("base_model", "org/tiny"),
        ("base_model.id", DELETED),
        ("base_model.hidden_size", 0),
        ("base_model.hidden_size", "4"),
        ("base_model.hidden_size", 4.5),
        ("base_model.num_layers", True),
        ("base_model.extra", 1),
        ("defaults", DELETED),
        ("defaults.strength", "0.5"),
        ("defaults.strength", True),
        ("defaults.strength", None),
        ("defaults.positions", "some"),
        ("defaults.eta", 0.5),
        ("limits.strength", [1, 0]),
        ("limits.strength", [0]),
        ("limits.strength", [0, 1, 2]),
        ("limits.strength", ["0", "1"]),
        ("limits.eta", [0, 1]),
        ("training.steps", [1]),
        ("training.steps", {"a": 1}),
        ("unknown_field", 1),
    ],
)
def test_refuses_a_wrong_field_and_names_it(place: str, value: object) -> None:
    fields = _changed(manifest_fields(), place, value)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(fields))

    message = str(caught.value)
    assert place in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("defaults.iterations", 5.0),
        ("defaults.iterations", True),
        ("defaults.iterations", -1),
        ("defaults.strength", 0.5),
        ("limits.iterations", [0.5, 2]),
        ("limits.iterations", [-1, 10]),
        ("limits.direction_scale", [3, 1]),
    ],
)
def test_refuses_a_wrong_field_of_a_reward_manifest(place: str, value: object) -> None:
    with pytest.raises(ManifestError, match=place.replace(".", r"\.")):
        parse_manifest(json.dumps(_changed(manifest_fields("reward"), place, value)))


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("affine", "defaults.strength", 1.5),
        ("affine", "defaults.strength", -0.1),
        ("reward", "defaults.eta", 2.5),
        ("reward", "defaults.iterations", 11),
        ("reward", "defaults.direction_scale", 3.5),
    ],
)
def test_defaults_lie_inside_limits(kind: str, place: str, value: float) -> None:
    with pytest.raises(ManifestError, match=place.replace(".", r"\.")):
        parse_manifest(json.dumps(_changed(manifest_fields(kind), place, value)))


def test_limits_the_wrong_way_round_are_said_to_be_so() -> None:
    fields = _changed(manifest_fields(), "limits.strength", [1, 0])
    with pytest.raises(ManifestError, match=r"minimum 1 exceeds its maximum 0"):
        parse_manifest(json.dumps(fields))
    fields = _changed(manifest_fields("reward"), "limits.iterations", [10, 2])
    with pytest.raises(ManifestError, match=r"limits\.iterations.*minimum 10 exceeds"):
        parse_manifest(json.dumps(fields))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("place", ["0.5", "0.25"])  # the default strength; a number of training
def test_refuses_numbers_that_are_not_finite(number: str, place: str) -> None:
    text = json.dumps(manifest_fields())
    assert text.count(place) == 1
    with pytest.raises(ManifestError):
        parse_manifest(text.replace(place, number))


def test_refuses_a_key_that_stands_twice() -> None:
    text = json.dumps(manifest_fields())
    with pytest.raises(ManifestError, match="repeats the key 'name'"):
        parse_manifest(text.replace('"name"', '"name": "other", "name"', 1))
    with pytest.raises(ManifestError, match="repeats the key 'samples'"):
        parse_manifest(text.replace('"samples"', '"samples": 1, "samples"', 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        '"text"',
        "[" * 100_000,
        '{"training":' * 100_000,
        '{"a":' * 150 + "1" + "}" * 150,
        json.dumps(manifest_fields()).replace("32", "9" * 10_000),
        json.dumps(manifest_fields()).replace("made up", "\ud800"),
        json.dumps(manifest_fields()).replace("made up", "\\ud800"),
        json.dumps(manifest_fields()) + "x",
    ],
    ids=lambda text: text[:20],
)
def test_refuses_what_is_no_json_object(text: str) -> None:
    with pytest.raises(ManifestError, match="manifest"):
        parse_manifest(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    place=st.sampled_from(sorted(manifest_fields())),
    value=_JSON,
    kind=st.sampled_from(("affine", "reward")),
)
def test_any_other_value_is_accepted_or_a_manifest_error(
    place: str, value: object, kind: str
) -> None:
    text = json.dumps(manifest_fields(kind) | {place: value})
    try:
        manifest = parse_manifest(text)
    except ManifestError:
        return
    assert parse_manifest(manifest_text(manifest)) == manifest


def test_manifests_are_frozen() -> None:
    manifest = affine_manifest()
    with pytest.raises(ValidationError):
        manifest.name = "other"


@pytest.mark.parametrize("name", ["a", "0", "detox-lineas", "a.b_c-d", "a" * 64])
def test_names_that_are_allowed(name: str) -> None:
    assert NAME_PATTERN.match(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-a", "_a", "A", "a/b", "a\\b", "a+b", "a b", "a\n", "a\0", "é", "a" * 65],
)
def test_names_that_are_not(name: str) -> None:
    assert not NAME_PATTERN.match(name)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "F" * 64, "g" * 64, "0" * 64 + "\n"])
def test_digests_that_are_not(digest: str) -> None:
    assert not DIGEST_PATTERN.match(digest)
    assert DIGEST_PATTERN.match("0123456789abcdef" * 4)
