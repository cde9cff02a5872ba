"""Tests of `steerserve fit gate`: gates on an artifact's maps, and refusals in one sentence."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from interventions.artifact import Artifact, read_artifact, write_artifact
from interventions.manifest import AffineDefaults, AffineManifest
from server.__main__ import app
from server.engine.torch.model.loader import load_model
from steering.affine import AffineParameters
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import split_texts
from steering.fit.gates import fit_gates
from steering.reward import RewardHead
from tests.fitting import fit_argre_by_command, fit_by_command, fit_lineas_by_command
from tests.tiny import SITES, WIDTH

TOXIC = [f"you {word} fool" for word in ("old", "mad", "vile", "poor", "dull", "sad")]
NEUTRAL = [f"the {word} sea" for word in ("old", "blue", "wide", "calm", "cold", "deep")]


@pytest.fixture
def gate_folder(model: str, folder: Path) -> Path:
    (folder / "toxic-6.txt").write_text("".join(f"{line}\n" for line in TOXIC))
    (folder / "neutral-6.txt").write_text("".join(f"{line}\n" for line in NEUTRAL))
    assert fit_lineas_by_command(model, folder, "--description", "maps").exit_code == 0
    return folder


def _fit_gate(model: str, folder: Path, *more: str) -> Result:
    files = {"--source": "toxic-6.txt", "--control": "neutral-6.txt", "--out": "g.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    small = ["--model", model, "--dtype", "float32", "--gate-components", "3"]
    artifact = str(folder / "tiny-lineas.safetensors")
    return CliRunner().invoke(app, ["fit", "gate", artifact, *options, *small, *more])


def _maps(artifact: Artifact) -> AffineParameters:
    assert not isinstance(artifact.parameters, RewardHead)
    return artifact.parameters


def test_an_artifacts_maps_get_gates_and_stay_as_they_are(model: str, gate_folder: Path) -> None:
    result = _fit_gate(model, gate_folder, "--seed", "3", "--json")
    assert result.exit_code == 0, result.stderr
    original = read_artifact(gate_folder / "tiny-lineas.safetensors")
    gated = read_artifact(gate_folder / "g.safetensors")
    loaded = load_model(model, dtype="float32")
    source, control = (
        [loaded.tokenizer(line)["input_ids"] for line in lines] for lines in (TOXIC, NEUTRAL)
    )
    settings = GateSettings(components=3, seed=3)
    texts = split_texts(source, control, settings)
    expected = fit_gates(loaded.model, SITES, texts, settings)
    assert set(_maps(gated)) == set(SITES)
    for site, map_ in _maps(gated).items():
        assert map_.gate is not None
        assert map_.gate.weight.shape == (WIDTH,)
        torch.testing.assert_close(map_.gate.weight, expected[site].weight)
        torch.testing.assert_close(map_.gate.bias, expected[site].bias)
        assert torch.equal(map_.weight, _maps(original)[site].weight)
        assert torch.equal(map_.bias, _maps(original)[site].bias)


def test_the_manifest_says_how_often_the_gates_are_right(model: str, gate_folder: Path) -> None:
    result = _fit_gate(model, gate_folder, "--json", "--gate-l2", "0.5", "--gate-held-out", "0.3")
    summary = json.loads(result.stdout)
    original = read_artifact(gate_folder / "tiny-lineas.safetensors")
    manifest = read_artifact(gate_folder / "g.safetensors").manifest
    assert isinstance(manifest, AffineManifest)
    assert (manifest.name, manifest.method, manifest.description) == ("g", "lineas", "maps")
    assert manifest.base_model == original.manifest.base_model
    training = manifest.training
    # How the maps were fitted stays.
    assert training.items() >= original.manifest.training.items()
    by_site = [training[f"gate_accuracy.{site}"] for site in SITES]
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in by_site)
    assert summary["gate_accuracy_min"] == training["gate_accuracy_min"] == min(by_site)  # type: ignore[type-var]
    assert summary["gate_accuracy"] == training["gate_accuracy"]
    control = (gate_folder / "neutral-6.txt").read_bytes()
    assert (
        training.items()
        >= {
            "gate": "regression",
            "gate_maps": f"sha256:{original.digest}",
            "gate_source": "toxic-6.txt",
            "gate_control": "neutral-6.txt",
            "gate_control_sha256": hashlib.sha256(control).hexdigest(),
            "gate_components": 3,
            "gate_l2": 0.5,
            "gate_held_out": 0.3,
            "gate_source_sentences": 4,
            "gate_control_sentences": 4,
            "gate_torch": torch.__version__,
        }.items()
    )
    assert str(gate_folder) not in manifest.model_dump_json()


def test_gates_are_replaced_and_the_name_may_be_given(model: str, gate_folder: Path) -> None:
    first = _fit_gate(model, gate_folder, "--name", "first", "--license", "MIT")
    assert first.exit_code == 0
    gated = gate_folder / "g.safetensors"
    gated.rename(gate_folder / "tiny-lineas.safetensors")
    again = _fit_gate(model, gate_folder, "--gate-components", "1", "--description", "new")
    assert again.exit_code == 0
    manifest = read_artifact(gated).manifest
    assert (manifest.name, manifest.description, manifest.license) == ("g", "new", "MIT")
    assert manifest.training["gate_components"] == 1


def test_the_strengths_of_the_maps_stay_unless_others_are_given(
    model: str, gate_folder: Path
) -> None:
    options = ("--strength", "1.5", "--max-strength", "2")
    assert fit_lineas_by_command(model, gate_folder, *options).exit_code == 0
    for chosen, default, limits in (
        ((), 1.5, (0.0, 2.0)),
        (("--strength", "0.5"), 0.5, (0.0, 2.0)),
        (("--max-strength", "4"), 1.5, (0.0, 4.0)),
        (("--strength", "3", "--max-strength", "3"), 3.0, (0.0, 3.0)),
    ):
        assert _fit_gate(model, gate_folder, *chosen).exit_code == 0
        manifest = read_artifact(gate_folder / "g.safetensors").manifest
        assert isinstance(manifest, AffineManifest)
        assert (manifest.defaults.strength, manifest.limits.strength) == (default, limits)


def test_negative_strengths_and_positions_stay(model: str, gate_folder: Path) -> None:
    path = gate_folder / "tiny-lineas.safetensors"
    assert fit_by_command("caa", model, gate_folder, "--sites", r"model\.layers\.\d").exit_code == 0
    caa = read_artifact(gate_folder / "caa.safetensors")
    defaults = AffineDefaults(strength=-2.0, positions="generated")
    write_artifact(path, caa.manifest.model_copy(update={"defaults": defaults}), caa.parameters)
    assert _fit_gate(model, gate_folder, "--strength", "-5", "--max-strength", "6").exit_code == 0
    manifest = read_artifact(gate_folder / "g.safetensors").manifest
    assert isinstance(manifest, AffineManifest)
    assert manifest.limits.strength == (-6.0, 6.0)
    assert manifest.defaults == AffineDefaults(strength=-5.0, positions="generated")


def test_maps_without_an_accurate_gate_are_left_out(model: str, gate_folder: Path) -> None:
    assert _fit_gate(model, gate_folder, "--gate-min-accuracy", "0").exit_code == 0
    training = read_artifact(gate_folder / "g.safetensors").manifest.training
    accuracy = {site: training[f"gate_accuracy.{site}"] for site in SITES}
    values = sorted(value for value in accuracy.values() if isinstance(value, float))
    result = _fit_gate(model, gate_folder, "--gate-min-accuracy", str(values[-1]))
    assert result.exit_code == 0
    artifact = read_artifact(gate_folder / "g.safetensors")
    kept = _maps(artifact)
    assert set(kept) == {site for site in SITES if accuracy[site] == values[-1]}
    assert artifact.manifest.training["sites_kept"] == len(kept)
    assert artifact.manifest.training["coordinates_kept"] == len(kept) * WIDTH


def test_a_sibling_model_is_a_warning(
    tiny_folders: Mapping[str, Path], model: str, gate_folder: Path
) -> None:
    path = gate_folder / "tiny-lineas.safetensors"
    artifact = read_artifact(path)
    base = artifact.manifest.base_model.model_copy(update={"fingerprint": "other"})
    manifest = artifact.manifest.model_copy(update={"base_model": base})
    write_artifact(path, manifest, artifact.parameters)
    result = _fit_gate(model, gate_folder)
    assert result.exit_code == 0
    assert "Warning: " in result.stderr
    other = _fit_gate(model, gate_folder, "--model", str(tiny_folders["gpt2"]))
    assert other.exit_code == 2
    assert "Error: " in other.stderr
    assert SITES[0] in other.stderr


def test_maps_of_inputs_get_gates_of_inputs(model: str, gate_folder: Path) -> None:
    sites = r"model\.layers\.\d\.self_attn\.o_proj\.input"
    assert fit_lineas_by_command(model, gate_folder, "--sites", sites).exit_code == 0
    result = _fit_gate(model, gate_folder)
    assert result.exit_code == 0, result.stderr
    gated = read_artifact(gate_folder / "g.safetensors")
    assert len(_maps(gated)) == 2
    for site, map_ in _maps(gated).items():
        assert site.endswith(".o_proj.input")
        assert map_.gate is not None
        assert f"gate_accuracy.{site}" in gated.manifest.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--control", "empty.txt"), "empty.txt: the file is empty"),
        (("--control", "gone.txt"), "gone.txt: No such file"),
        (("--control", "toxic-6.txt"), "6 of the control's 6 sentences are in the source too"),
        (("--source", "one.txt"), "the source has 1 different sentences"),
        (("--gate-components", "99"), "ask for fewer components"),
        (("--gate-l2", "0"), "l2 must be a positive number"),
        (("--gate-held-out", "1"), "must lie between 0 and 1"),
        (("--gate-min-accuracy", "2"), "gate-min-accuracy"),
        (("--strength", "2"), "default strength 2 lies outside of [0, 1]"),
        (("--strength", "-1", "--max-strength", "2"), "strength -1 lies outside of [0, 2]"),
        (("--max-strength", "0.5"), "default strength 1 lies outside of [0, 0.5]"),
        (("--max-strength", "101"), "--max-strength"),
        (("--strength", "nan"), "--strength"),
        (("--out", "x.bin"), "must end in .safetensors"),
        (("--model", "/no/such/model"), "cannot load '/no/such/model'"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    model: str,
    gate_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(gate_folder)
    Path("empty.txt").write_text("\n")
    Path("one.txt").write_text("same\nsame\n")
    result = _fit_gate(model, gate_folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not Path("g.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tiny-argre.safetensors", "is of kind reward: only affine maps have gates"),
        ("toxic.txt", "Error: "),
        ("gone.safetensors", "Error: "),
    ],
)
def test_a_file_without_maps_is_refused(
    model: str, gate_folder: Path, file: str, message: str
) -> None:
    assert fit_argre_by_command(model, gate_folder).exit_code == 0
    (gate_folder / "tiny-lineas.safetensors").unlink()
    if (gate_folder / file).exists():
        (gate_folder / file).rename(gate_folder / "tiny-lineas.safetensors")
    result = _fit_gate(model, gate_folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
