"""Tests of `steerserve fit lineas`: an artifact, and refusals in one sentence."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import AffineManifest
from server.engine.torch.model.loader import load_model
from steering.reward import RewardHead
from tests.fitting import fit_lineas_by_command
from tests.tiny import SITES, WIDTH


def test_lineas_end_to_end(model: str, folder: Path) -> None:
    result = fit_lineas_by_command(
        model, folder, "--json", "--strength", "0.75", "--license", "CC0-1.0"
    )
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    artifact = read_artifact(folder / "tiny-lineas.safetensors")
    assert summary["digest"] == f"sha256:{artifact.digest}"
    assert summary["name"] == artifact.manifest.name == "tiny-lineas"
    assert summary["final_loss"] < summary["initial_loss"]
    manifest = artifact.manifest
    assert isinstance(manifest, AffineManifest)
    assert manifest.method == "lineas"
    assert manifest.license == "CC0-1.0"
    assert manifest.defaults.strength == 0.75
    assert check_compatible(artifact, load_model(model, dtype="float32").description) == ()
    assert not isinstance(artifact.parameters, RewardHead)
    assert set(artifact.parameters) == set(SITES)
    assert all(map_.weight.shape == (WIDTH,) for map_ in artifact.parameters.values())
    training = manifest.training
    source = (folder / "toxic.txt").read_bytes()
    assert training["source"] == "toxic.txt"
    assert training["source_sha256"] == hashlib.sha256(source).hexdigest()
    expected = {"samples": 3, "steps": 3, "optimizer": "sgd", "seed": 0, "model_dtype": "float32"}
    assert {key: training[key] for key in expected} == expected
    assert training["torch"] == torch.__version__
    assert training["device"] == "cpu"
    # Every client that may list interventions reads the manifest: it holds no path of this machine.
    assert str(folder) not in manifest.model_dump_json()
    assert str(Path(model).parent) not in manifest.model_dump_json()
    assert {"transformers", "initial_loss", "final_loss", "learning_rate"} <= training.keys()


def test_a_fixed_date_makes_the_same_bytes(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")
    digests = {
        json.loads(fit_lineas_by_command(model, folder, "--json").stdout)["digest"]
        for _ in range(2)
    }
    assert len(digests) == 1
    created = read_artifact(folder / "tiny-lineas.safetensors").manifest.created
    assert created.isoformat() == "2026-11-21T00:00:00+00:00"


def test_sites_may_be_chosen(model: str, folder: Path) -> None:
    assert fit_lineas_by_command(model, folder, "--sites", r"model\.layers\.1\.mlp").exit_code == 0
    parameters = read_artifact(folder / "tiny-lineas.safetensors").parameters
    assert not isinstance(parameters, RewardHead)
    assert set(parameters) == {"model.layers.1.mlp"}


def test_a_pattern_chooses_outputs_of_modules_only(model: str, folder: Path) -> None:
    assert "model.layers.1.mlp.input" in load_model(model, dtype="float32").description.site_widths
    assert (
        fit_lineas_by_command(
            model, folder, "--sites", r"model\.layers\.1\.mlp(\.input)?"
        ).exit_code
        == 0
    )
    parameters = read_artifact(folder / "tiny-lineas.safetensors").parameters
    assert not isinstance(parameters, RewardHead)
    assert set(parameters) == {"model.layers.1.mlp"}
    result = fit_lineas_by_command(model, folder, "--sites", r".*\.input")
    assert result.exit_code == 2
    assert "matches no module" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4"), "4 samples were asked for, the source has 3"),
        (("--sites", "nothing"), "matches no module"),
        (("--sites", "("), "not a regular expression"),
        (("--out", "x.bin"), "must end in .safetensors"),
        (("--out", "/nowhere/x.safetensors"), "/nowhere"),
        (("--out", "Bad Name.safetensors"), "'Bad Name' is not a name"),
        (("--name", "no/slash"), "'no/slash' is not a name"),
        (("--source", "gone.txt"), "gone.txt: No such file"),
        (("--model", "/no/such/model"), "cannot load '/no/such/model'"),
        (("--dtype", "int8"), "dtype must be"),
        (("--learning-rate", "0"), "learning_rate must be a positive number"),
        (("--learning-rate", "1e30", "--steps", "9"), "lower the learning rate"),
        (("--license", " "), "--license"),
        (("--device", "tpu"), "tpu"),
        (("--optimizer", "newton"), "newton"),
        (("--strength", "2"), "strength"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    model: str, folder: Path, options: tuple[str, ...], message: str
) -> None:
    result = fit_lineas_by_command(model, folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / "tiny-lineas.safetensors").exists()
