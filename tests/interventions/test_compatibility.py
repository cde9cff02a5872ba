"""Tests of which models can take an artifact, and of differences that are only a warning."""

from dataclasses import replace

import pytest

from interventions.artifact import Artifact
from interventions.compatibility import (
    IncompatibleArtifactError,
    check_compatible,
    check_shapes,
    unservable_reason,
)
from interventions.layout import shapes_of
from interventions.model import ModelDescription
from steering.affine import AffineMap
from tests.artifact_samples import (
    affine_manifest,
    affine_parameters,
    manifest_fields,
    reward_head,
    reward_manifest,
)

MODEL = ModelDescription(
    id="org/tiny",
    architecture="LlamaForCausalLM",
    hidden_size=4,
    num_layers=2,
    vocab_size=100,
    head_width=4,
    site_widths={"model.layers.0.norm": 4, "model.layers.1.norm": 4, "model.layers.1.up": 8},
    fingerprint="f" * 64,
)
AFFINE = Artifact("0" * 64, 1, affine_manifest(), affine_parameters())
REWARD = Artifact("0" * 64, 1, reward_manifest(), reward_head())


@pytest.mark.parametrize("artifact", [AFFINE, REWARD], ids=["affine", "reward"])
def test_the_base_model_itself_gives_no_warning(artifact: Artifact) -> None:
    assert check_compatible(artifact, MODEL) == ()


@pytest.mark.parametrize("artifact", [AFFINE, REWARD], ids=["affine", "reward"])
@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("fingerprint", "e" * 64, "fingerprint"),
        ("id", "org/tiny-instruct", '"org/tiny-instruct"'),
        ("architecture", "Qwen3ForCausalLM", "architecture"),
        ("vocab_size", 101, "vocab_size"),
        ("num_layers", 3, "num_layers"),
    ],
)
def test_a_sibling_is_a_warning(
    artifact: Artifact, field: str, value: str | int, word: str
) -> None:
    sibling = replace(MODEL, **{field: value})  # type: ignore[arg-type]
    (warning,) = check_compatible(artifact, sibling)
    assert word in warning


WEIGHTS, CONFIGURATION = "f" * 64, "c" * 64


@pytest.mark.parametrize(
    ("fitted", "words"),
    [
        (f"{WEIGHTS}-{CONFIGURATION}", ()),
        (WEIGHTS, ()),  # an older manifest's, without the configuration's digest
        (f"{WEIGHTS}-{'d' * 64}", ("another configuration",)),
        (f"{'e' * 64}-{CONFIGURATION}", ("other weights",)),
        (f"{'e' * 64}-{'d' * 64}", ("other weights", "another configuration")),
        ("e" * 64, ("other weights",)),
    ],
)
def test_weights_and_configuration_are_compared_each(fitted: str, words: tuple[str, ...]) -> None:
    base_model = manifest_fields()["base_model"]
    assert isinstance(base_model, dict)
    manifest = affine_manifest(base_model=base_model | {"fingerprint": fitted})
    model = replace(MODEL, fingerprint=f"{WEIGHTS}-{CONFIGURATION}")
    warnings = check_compatible(replace(AFFINE, manifest=manifest), model)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_no_fingerprint_is_no_warning() -> None:
    base_model = manifest_fields()["base_model"]
    assert isinstance(base_model, dict)
    manifest = affine_manifest(base_model=base_model | {"fingerprint": None})
    assert check_compatible(replace(AFFINE, manifest=manifest), MODEL) == ()


def test_a_missing_site_is_refused() -> None:
    other = replace(MODEL, site_widths={"model.layers.0.norm": 4})
    with pytest.raises(IncompatibleArtifactError, match=r'no site "model\.layers\.1\.norm"\.'):
        check_compatible(AFFINE, other)
    with pytest.raises(IncompatibleArtifactError, match="and 1 more"):
        check_compatible(AFFINE, replace(MODEL, site_widths={}))


def test_another_width_of_a_site_is_refused() -> None:
    other = replace(MODEL, site_widths={**MODEL.site_widths, "model.layers.1.norm": 5})
    with pytest.raises(IncompatibleArtifactError, match=r"layers\.1\.norm.* width 4.* 5"):
        check_compatible(AFFINE, other)


def test_an_input_is_another_site_than_the_output() -> None:
    (part, *_) = affine_parameters().values()
    artifact = replace(AFFINE, parameters={"model.layers.1.up.input": part})
    with pytest.raises(IncompatibleArtifactError, match=r'no site "model\.layers\.1\.up\.input"\.'):
        check_compatible(artifact, MODEL)
    widths = {**MODEL.site_widths, "model.layers.1.up.input": 4}
    assert check_compatible(artifact, replace(MODEL, site_widths=widths)) == ()
    widths["model.layers.1.up.input"] = 6
    with pytest.raises(
        IncompatibleArtifactError, match=r'"model\.layers\.1\.up\.input" has width 4.* 6 there'
    ):
        check_compatible(artifact, replace(MODEL, site_widths=widths))


def test_a_missing_site_that_may_be_meant_as_a_gate_says_how_one_looks() -> None:
    (part, *_) = affine_parameters().values()
    site = "model.layers.0.norm"
    both = replace(AFFINE, parameters={site: part, f"{site}.gate": part})
    with pytest.raises(IncompatibleArtifactError, match=r'gate of site "model\.layers\.0\.norm"'):
        check_compatible(both, MODEL)
    alone = replace(AFFINE, parameters={f"{site}.gate": part})
    with pytest.raises(
        IncompatibleArtifactError, match=r'no site "model\.layers\.0\.norm\.gate"\.$'
    ):
        check_compatible(alone, MODEL)


def test_another_width_of_the_head_is_refused() -> None:
    with pytest.raises(IncompatibleArtifactError, match=r"width 4.* width 6"):
        check_compatible(REWARD, replace(MODEL, head_width=6))


def test_a_head_need_not_be_as_wide_as_the_hidden_size() -> None:
    """OPT-350m projects its hidden states down before lm_head."""
    artifact = Artifact("0" * 64, 1, reward_manifest(), reward_head(width=3))
    assert check_compatible(artifact, replace(MODEL, head_width=3)) == ()


def test_a_site_need_not_be_as_wide_as_the_hidden_size() -> None:
    parameters = {"model.layers.1.up": affine_parameters(width=8)["model.layers.0.norm"]}
    assert check_compatible(replace(AFFINE, parameters=parameters), MODEL) == ()


@pytest.mark.parametrize("artifact", [AFFINE, REWARD], ids=["affine", "reward"])
def test_a_manifest_whose_hidden_size_is_not_its_tensors(artifact: Artifact) -> None:
    base_model = artifact.manifest.base_model.model_copy(update={"hidden_size": 6})
    manifest = artifact.manifest.model_copy(update={"base_model": base_model})
    with pytest.raises(IncompatibleArtifactError, match="hidden size 6"):
        check_compatible(replace(artifact, manifest=manifest), MODEL)


def test_a_manifest_with_fewer_layers_than_its_sites() -> None:
    base_model = AFFINE.manifest.base_model.model_copy(update={"num_layers": 1})
    manifest = AFFINE.manifest.model_copy(update={"base_model": base_model})
    with pytest.raises(IncompatibleArtifactError, match=r"1 layers.*model\.layers\.1\.norm"):
        check_compatible(replace(AFFINE, manifest=manifest), MODEL)


def test_a_later_number_in_a_site_is_no_layer() -> None:
    site = "model.layers.1.experts.63"
    part: AffineMap = affine_parameters()["model.layers.0.norm"]
    model = replace(MODEL, site_widths={site: 4})
    assert check_compatible(replace(AFFINE, parameters={site: part}), model) == ()


def test_shapes_alone_give_the_same_answer() -> None:
    shapes = shapes_of(AFFINE.parameters)
    assert check_shapes(AFFINE.manifest, shapes, MODEL) == ()
    with pytest.raises(IncompatibleArtifactError, match="no site"):
        check_shapes(AFFINE.manifest, shapes, replace(MODEL, site_widths={}))


def test_sites_that_were_not_prepared_are_named_with_the_options_that_prepare_them() -> None:
    first, second = affine_parameters()
    shapes = shapes_of(AFFINE.parameters)
    assert unservable_reason(shapes, MODEL) is None
    reason = unservable_reason(shapes, replace(MODEL, unprepared_sites={second: "--site b"}))
    assert reason is not None
    assert f'not prepared the site "{second}". Restart it' in reason
    assert "or add --site b to its options." in reason
    for options, told in (("--site a", "--site a"), ("--site b", "--site a --site b")):
        model = replace(MODEL, unprepared_sites={first: "--site a", second: options})
        reason = unservable_reason(shapes, model)
        assert reason is not None
        assert f'not prepared the site "{first}" and 1 more. Restart it' in reason
        assert f"or add {told} to its options." in reason


def test_a_site_that_is_impossible_counts_before_one_that_was_not_prepared() -> None:
    first, second = affine_parameters()
    model = replace(MODEL, unprepared_sites={first: "--site a"}, impossible_sites={second: "No."})
    shapes = shapes_of(AFFINE.parameters)
    assert unservable_reason(shapes, model) == f'This server cannot edit the site "{second}". No.'


def test_a_reward_has_no_sites_that_could_be_unprepared() -> None:
    model = replace(MODEL, unprepared_sites=dict.fromkeys(MODEL.site_widths, "--site a"))
    assert unservable_reason(shapes_of(REWARD.parameters), model) is None
