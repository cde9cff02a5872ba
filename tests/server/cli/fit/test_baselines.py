"""Tests of the fit commands that train nothing: artifacts, how they are served, refusals."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from interventions.artifact import Artifact, read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import AffineManifest
from interventions.request_settings import Caps, InvalidSettingError, resolve_settings
from server.engine.request import Edit
from server.engine.torch.model.loader import load_model
from steering.affine import AffineMap
from steering.fit.activations import collect_token_means
from steering.reward import RewardHead
from steering.settings import AffineSettings
from tests.conftest import StartEngine
from tests.fitting import fit_by_command
from tests.steered import PROMPTS, assert_equal_to_stack, generate, tokens_of
from tests.tiny import SITES, tiny_model, tiny_tokenizer

HEAD_OUTPUTS = tuple(f"model.layers.{layer}.self_attn.o_proj.input" for layer in range(2))
METHODS = {"lin-act": "lin-act", "mean-act": "mean", "caa": "caa", "iti": "iti"}


def _fit(method: str, model: str, folder: Path, *more: str) -> tuple[Artifact, dict[str, Any]]:
    result = fit_by_command(method, model, folder, "--json", *more)
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return read_artifact(folder / f"{method}.safetensors"), summary


def _maps(artifact: Artifact) -> Mapping[str, AffineMap]:
    assert not isinstance(artifact.parameters, RewardHead)
    return artifact.parameters


def _affine(artifact: Artifact) -> AffineManifest:
    assert isinstance(artifact.manifest, AffineManifest)
    return artifact.manifest


def _activations(folder: Path, site: str, pooling: Any) -> tuple[torch.Tensor, torch.Tensor]:
    source, target = (
        collect_token_means(
            tiny_model("llama"),
            [site],
            [
                tiny_tokenizer()(line)["input_ids"]
                for line in (folder / file).read_text().split("\n")[:-1]
            ],
            batch_size=3,
            pooling=pooling,
        )[site]
        for file in ("toxic.txt", "neutral.txt")
    )
    return source, target


@pytest.mark.parametrize("method", METHODS)
def test_an_artifact_says_how_it_was_made(model: str, folder: Path, method: str) -> None:
    artifact, summary = _fit(method, model, folder, "--license", "CC0-1.0", "--description", "x")
    manifest = _affine(artifact)
    assert summary["digest"] == f"sha256:{artifact.digest}"
    assert (summary["method"], manifest.method) == (METHODS[method], METHODS[method])
    assert (manifest.name, manifest.license, manifest.description) == (method, "CC0-1.0", "x")
    assert check_compatible(artifact, load_model(model, dtype="float32").description) == ()
    training = manifest.training
    expected = {
        "source": "toxic.txt",
        "source_sha256": hashlib.sha256((folder / "toxic.txt").read_bytes()).hexdigest(),
        "target": "neutral.txt",
        "source_sentences": 3,
        "target_sentences": 3,
        "samples": None,
        "max_tokens": 128,
        "model_dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__,
    }
    assert {key: training[key] for key in expected} == expected
    figures = {"best_accuracy"} if method == "iti" else {"initial_distance", "final_distance"}
    assert figures <= training.keys() & summary.keys()
    assert str(folder) not in manifest.model_dump_json()
    assert str(Path(model).parent) not in manifest.model_dump_json()


@pytest.mark.parametrize("method", METHODS)
async def test_the_engine_serves_it_as_the_oracle_does(
    model: str, folder: Path, start_engine: StartEngine, method: str
) -> None:
    artifact, _ = _fit(method, model, folder, *(("--heads", "3") if method == "iti" else ()))
    maps = _maps(artifact)
    default = resolve_settings(artifact.manifest, {}, Caps())
    assert isinstance(default, AffineSettings)
    engine = await start_engine({"fitted": maps})
    seen = {tuple(tokens_of(await generate(engine, PROMPTS[0])))}
    for settings in (default, AffineSettings(0.6 * default.strength, "generated")):
        outputs = await generate(engine, PROMPTS[0], (Edit("fitted", settings),))
        assert_equal_to_stack(outputs, "llama", PROMPTS[0], [(maps, settings)])
        seen.add(tuple(tokens_of(outputs)))
    assert len(seen) == 3, "the intervention does nothing"


def test_lin_act_maps_the_familys_sites_within_the_sources_range(model: str, folder: Path) -> None:
    artifact, summary = _fit("lin-act", model, folder, "--strength", "0.75")
    maps, manifest = _maps(artifact), _affine(artifact)
    assert set(maps) == set(SITES)
    source, _ = _activations(folder, SITES[0], "mean")
    torch.testing.assert_close(maps[SITES[0]].low, source.min(0).values)
    torch.testing.assert_close(maps[SITES[0]].high, source.max(0).values)
    assert manifest.defaults.strength == 0.75
    assert manifest.limits.strength == (0.0, 1.0)
    assert (manifest.training["low_quantile"], manifest.training["high_quantile"]) == (0, 1)
    assert summary["final_distance"] < summary["initial_distance"]


def test_the_support_of_lin_act_may_be_narrower_or_left_out(model: str, folder: Path) -> None:
    artifact, _ = _fit("lin-act", model, folder, "--quantiles", "0.25", "0.75")
    source, _ = _activations(folder, SITES[0], "mean")
    low = torch.quantile(source, 0.25, dim=0)
    torch.testing.assert_close(_maps(artifact)[SITES[0]].low, low)
    assert artifact.manifest.training["low_quantile"] == 0.25
    artifact, _ = _fit("lin-act", model, folder, "--no-support")
    assert all(map_.low is None for map_ in _maps(artifact).values())
    assert artifact.manifest.training["support"] is False
    assert "low_quantile" not in artifact.manifest.training


@pytest.mark.parametrize("method", ["lin-act", "mean-act"])
def test_the_sides_read_through_earlier_maps_may_be_chosen(
    model: str, folder: Path, method: str
) -> None:
    digests = set()
    for sides in ("source", "both", "none"):
        artifact, _ = _fit(method, model, folder, "--mapped-sides", sides)
        assert artifact.manifest.training["mapped_sides"] == sides
        digests.add(_maps(artifact)[SITES[1]].bias.sum().item())
    assert len(digests) == 3


@pytest.mark.parametrize("method", ["lin-act", "mean-act"])
def test_a_map_may_be_served_beyond_its_target(model: str, folder: Path, method: str) -> None:
    artifact, _ = _fit(method, model, folder, "--max-strength", "3", "--strength", "1.5")
    assert _affine(artifact).limits.strength == (0.0, 3.0)
    assert resolve_settings(artifact.manifest, {}, Caps()) == AffineSettings(1.5)
    assert resolve_settings(artifact.manifest, {"strength": 3}, Caps()) == AffineSettings(3.0)


def test_mean_act_shifts_by_the_difference_of_the_means(model: str, folder: Path) -> None:
    artifact, _ = _fit("mean-act", model, folder, "--sites", r".*\.0\.self_attn\.o_proj\.input")
    (site, map_), *others = _maps(artifact).items()
    assert (site, others) == (HEAD_OUTPUTS[0], [])
    source, target = _activations(folder, site, "mean")
    torch.testing.assert_close(map_.bias, target.mean(0) - source.mean(0), atol=1e-5, rtol=1e-4)
    assert map_.low is None


@pytest.mark.parametrize(
    ("options", "site"), [((), "model.layers.1"), (("--layer", "0"), "model.layers.0")]
)
def test_caa_shifts_one_layer_by_the_last_tokens_difference(
    model: str, folder: Path, options: tuple[str, ...], site: str
) -> None:
    artifact, _ = _fit("caa", model, folder, *options, "--max-strength", "4", "--strength", "-3")
    ((chosen, map_),) = _maps(artifact).items()
    assert chosen == artifact.manifest.training["sites"] == site
    source, target = _activations(folder, site, "last")
    torch.testing.assert_close(map_.bias, (target - source).mean(0), atol=1e-5, rtol=1e-4)
    manifest = _affine(artifact)
    assert manifest.limits.strength == (-4.0, 4.0)
    assert manifest.defaults.strength == -3
    assert resolve_settings(manifest, {"strength": -4}, Caps()) == AffineSettings(-4.0)
    with pytest.raises(InvalidSettingError, match="strength"):
        resolve_settings(manifest, {"strength": -4.5}, Caps())


def test_caa_at_several_sites_reads_the_untouched_model(model: str, folder: Path) -> None:
    artifact, _ = _fit("caa", model, folder, "--sites", r"model\.layers\.\d+", "--pooling", "mean")
    maps = _maps(artifact)
    assert set(maps) == {"model.layers.0", "model.layers.1"}
    for site, map_ in maps.items():
        source, target = _activations(folder, site, "mean")
        expected = target.mean(0) - source.mean(0)
        torch.testing.assert_close(map_.bias, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "shifted"), [(3, 3), (100, 8)])
def test_iti_shifts_heads_before_the_output_projection(
    model: str, folder: Path, heads: int, shifted: int
) -> None:
    artifact, summary = _fit(
        "iti", model, folder, "--heads", str(heads), "--direction", "mean", "--strength", "-2"
    )
    maps, manifest = _maps(artifact), _affine(artifact)
    assert set(maps) <= set(HEAD_OUTPUTS)
    assert (summary["shifted_heads"], summary["all_heads"]) == (shifted, 8)
    found = 0
    for site, map_ in maps.items():
        source, target = _activations(folder, site, "last")
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            if not map_.bias[part].any():
                continue
            found += 1
            theta = torch.nn.functional.normalize((target - source)[:, part].mean(0), dim=0)
            along = torch.cat([source, target])[:, part] @ theta
            expected = along.std(correction=0) * theta
            torch.testing.assert_close(map_.bias[part], expected, atol=1e-5, rtol=1e-3)
    assert found == shifted
    assert manifest.limits.strength == (-30.0, 30.0)
    assert manifest.defaults.strength == -2


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_date_makes_the_same_bytes(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")
    options = ("--samples", "2", "--seed", "4")
    digests = {_fit(method, model, folder, *options)[1]["digest"] for _ in range(2)}
    assert len(digests) == 1


def test_samples_are_drawn_by_the_seed(model: str, folder: Path) -> None:
    shifts = set()
    for seed in range(6):
        artifact, _ = _fit("caa", model, folder, "--samples", "1", "--seed", str(seed))
        assert artifact.manifest.training["source_sentences"] == 1
        shifts.add(next(iter(_maps(artifact).values())).bias.sum().item())
    assert len(shifts) > 1


def test_files_of_unequal_length_and_of_one_sentence(model: str, folder: Path) -> None:
    (folder / "neutral.txt").write_text("you there\n")
    for method in ("mean-act", "caa"):
        artifact, _ = _fit(method, model, folder)
        assert artifact.manifest.training["target_sentences"] == 1
        assert all(map_.bias.isfinite().all() for map_ in _maps(artifact).values())
    for method, message in (("lin-act", "at least 2 sentences"), ("iti", "at least 2 sentences")):
        result = fit_by_command(method, model, folder)
        assert (result.exit_code, message in result.stderr) == (2, True)
        assert not (folder / f"{method}.safetensors").exists()
    (folder / "neutral.txt").write_text("you there\nwhat a person\n")
    for method in METHODS:
        artifact, _ = _fit(method, model, folder)
        assert artifact.manifest.training["target_sentences"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_same_sentences_on_both_sides_are_refused(
    model: str, folder: Path, method: str
) -> None:
    (folder / "neutral.txt").write_bytes((folder / "toxic.txt").read_bytes())
    result = fit_by_command(method, model, folder)
    assert result.exit_code == 2
    assert "hold the same sentences" in result.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_other_families_have_default_sites_too(
    tiny_folders: Mapping[str, Path], folder: Path, family: str, method: str
) -> None:
    artifact, _ = _fit(method, str(tiny_folders[family]), folder)
    assert check_compatible(artifact, load_model(str(tiny_folders[family])).description) == ()
    assert _maps(artifact)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4"), "4 samples were asked for, the source has 3"),
        (("--sites", "nothing"), "matches no module"),
        (("--sites", "("), "not a regular expression"),
        (("--out", "x.bin"), "must end in .safetensors"),
        (("--source", "gone.txt"), "gone.txt: No such file"),
        (("--model", "/no/such/model"), "cannot load '/no/such/model'"),
        (("--device", "tpu"), "tpu"),
        (("--pooling", "median"), "median"),
        (("--strength", "1000"), "--strength"),
        (("--strength", "nan"), "--strength"),
        (("--max-strength", "101"), "--max-strength"),
        (("--max-strength", "nan"), "--max-strength"),
        (("--batch-size", "0"), "batch-size"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    model: str, folder: Path, method: str, options: tuple[str, ...], message: str
) -> None:
    _assert_refused(method, model, folder, options, message)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lin-act", ("--quantiles", "0.9", "0.1"), "the lower one first, not 0.9 and 0.1"),
        ("lin-act", ("--mapped-sides", "target"), "target"),
        ("lin-act", ("--strength", "1.5"), "1.5 lies outside of [0, 1]"),
        ("mean-act", ("--strength", "1.5"), "1.5 lies outside of [0, 1]"),
        ("mean-act", ("--strength", "-1"), "strength"),
        ("caa", ("--layer", "2"), "the model has 2 blocks, 0 to 1"),
        ("caa", ("--layer", "1", "--sites", "x"), "either --layer or --sites"),
        ("caa", ("--strength", "-3"), "or a greater --max-strength"),
        ("iti", ("--heads", "0"), "heads"),
        ("iti", ("--held-out", "1"), "held_out must lie between 0 and 1"),
        ("iti", ("--direction", "pca"), "pca"),
        ("iti", ("--sites", r"model\.layers\.\d"), "chooses model.layers.0, an output"),
    ],
)
def test_a_methods_own_wrong_option_is_one_sentence_and_status_2(
    model: str, folder: Path, method: str, options: tuple[str, ...], message: str
) -> None:
    _assert_refused(method, model, folder, options, message)


def _assert_refused(
    method: str, model: str, folder: Path, options: tuple[str, ...], message: str
) -> None:
    result = fit_by_command(method, model, folder, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / f"{method}.safetensors").exists()
