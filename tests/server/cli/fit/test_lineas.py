"""Tests of `steerserve fit lineas`: an artifact, and refusals in one sentence."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import AffineManifest
from interventions.request_settings import Caps, InvalidSettingError, resolve_settings
from server.engine.torch.model.loader import load_model
from steering.reward import RewardHead
from steering.settings import AffineSettings
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
    assert manifest.limits.strength == (0.0, 1.0)
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


@pytest.mark.parametrize(
    ("pattern", "sites"),
    [
        (r"model\.layers\.1\.mlp", {"model.layers.1.mlp"}),
        (r"model\.layers\.1\.mlp(\.input)?", {"model.layers.1.mlp"}),
        (r"model\.norm", {"model.norm"}),
        (
            r".*\.o_proj\.input",
            {f"model.layers.{layer}.self_attn.o_proj.input" for layer in range(2)},
        ),
        (
            r"model\.layers\.0\.(mlp|self_attn\.o_proj\.input)",
            {"model.layers.0.mlp", "model.layers.0.self_attn.o_proj.input"},
        ),
    ],
)
def test_sites_may_be_chosen(model: str, folder: Path, pattern: str, sites: set[str]) -> None:
    result = fit_lineas_by_command(
        model, folder, "--sites", pattern, "--optimizer", "adam", "--learning-rate", "0.001"
    )
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(folder / "tiny-lineas.safetensors")
    assert not isinstance(artifact.parameters, RewardHead)
    assert set(artifact.parameters) == sites
    assert check_compatible(artifact, load_model(model, dtype="float32").description) == ()


def test_every_setting_reaches_the_fit_and_the_manifest(model: str, folder: Path) -> None:
    with (folder / "neutral.txt").open("a") as file:
        file.write("one more\nand another\n")
    chosen = {
        "target_samples": 5,
        "steps": 4,
        "batch_size": 2,
        "micro_batch": 1,
        "pooling": "last",
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "weight_decay": 0.25,
        "gamma": 0.001,
        "lambda_1": 2.0,
        "lambda_group": 0.5,
        "seed": 7,
        "max_tokens": 9,
    }
    options = [
        part
        for name, value in chosen.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    result = fit_lineas_by_command(model, folder, *options)
    assert result.exit_code == 0, result.stderr
    training = read_artifact(folder / "tiny-lineas.safetensors").manifest.training
    assert {key: training[key] for key in chosen} == chosen


def test_requests_may_be_allowed_strengths_above_the_papers(model: str, folder: Path) -> None:
    result = fit_lineas_by_command(model, folder, "--max-strength", "2.5", "--strength", "2")
    assert result.exit_code == 0, result.stderr
    manifest = read_artifact(folder / "tiny-lineas.safetensors").manifest
    assert resolve_settings(manifest, {}, Caps()) == AffineSettings(2.0)
    assert resolve_settings(manifest, {"strength": 2.5}, Caps()) == AffineSettings(2.5)
    for refused in (2.6, -0.1):
        with pytest.raises(InvalidSettingError, match=r"must lie in \[0, 2.5\]"):
            resolve_settings(manifest, {"strength": refused}, Caps())


def test_the_bar_shows_the_loss_and_the_time_left(model: str, folder: Path) -> None:
    stderr = fit_lineas_by_command(model, folder).stderr
    assert re.search(r"learning maps .* 3/3 \d:\d\d:\d\d loss \d", stderr)


def test_a_line_without_tokens_is_named(model: str, folder: Path) -> None:
    silent = folder / "silent"
    shutil.copytree(model, silent)
    tokenizer = json.loads((silent / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (silent / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "neutral.txt").write_text("you there\n~~\nnot for me\n")
    result = fit_lineas_by_command(str(silent), folder)
    assert result.exit_code == 2
    assert "neutral.txt:2: the model's tokenizer makes no token of the line" in result.stderr
    assert not (folder / "tiny-lineas.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("", "you there\n", "toxic.txt: the file is empty"),
        ("you fool\n", " \n", "neutral.txt: the file is empty"),
        ("a\nb\nc\n", "c\nb\na\n", "hold the same sentences"),
    ],
)
def test_empty_and_one_sided_data_are_refused(
    model: str, folder: Path, source: str, target: str, message: str
) -> None:
    (folder / "toxic.txt").write_text(source)
    (folder / "neutral.txt").write_text(target)
    result = fit_lineas_by_command(model, folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (folder / "tiny-lineas.safetensors").exists()


def test_the_paper_cuts_sentences_to_128_tokens(model: str, folder: Path) -> None:
    assert fit_lineas_by_command(model, folder).exit_code == 0
    training = read_artifact(folder / "tiny-lineas.safetensors").manifest.training
    assert training["max_tokens"] == 128


def test_the_support_is_reported_and_identities_are_left_out(model: str, folder: Path) -> None:
    options = ("--json", "--gamma", "0.05", "--optimizer", "sgd", "--learning-rate", "0.02")
    result = fit_lineas_by_command(model, folder, *options, "--lambda-group", "0")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    artifact = read_artifact(folder / "tiny-lineas.safetensors")
    assert not isinstance(artifact.parameters, RewardHead)
    kept = sum(
        int(((map_.weight != 1) | (map_.bias != 0)).sum()) for map_ in artifact.parameters.values()
    )
    counts = {
        "sites_fitted": 2,
        "sites_kept": len(artifact.parameters),
        "coordinates_fitted": 2 * WIDTH,
        "coordinates_kept": kept,
    }
    assert 0 < kept < 2 * WIDTH
    assert {key: summary[key] for key in counts} == counts
    assert {key: artifact.manifest.training[key] for key in counts} == counts
    shown = fit_lineas_by_command(model, folder, *options[1:], "--lambda-group", "0").stdout
    assert f"sites fitted 2, sites kept {len(artifact.parameters)}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4"), "4 samples were asked for, the source has 3"),
        (("--sites", "nothing"), "matches no module"),
        (("--sites", "("), "not a regular expression"),
        (("--sites", r".*rotary_emb"), "matches no module whose output is one vector"),
        (("--target-samples", "9"), "9 samples were asked for, the target has 3"),
        (("--gamma", "1e9"), "sparsity took every map away: lower gamma"),
        (("--gamma", "-1"), "gamma must be"),
        (("--weight-decay", "0.1"), "weight_decay is a setting of adamw"),
        (("--pooling", "median"), "median"),
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
        (("--strength", "2"), "strength 2 lies outside of [0, 1]: give another --strength, or a g"),
        (("--strength", "3", "--max-strength", "2.5"), "strength 3 lies outside of [0, 2.5]"),
        (("--max-strength", "0.5"), "strength 1 lies outside of [0, 0.5]"),
        (("--max-strength", "101"), "max-strength"),
        (("--max-strength", "nan"), "max-strength"),
        (("--strength", "-1"), "strength"),
        (("--strength", "nan"), "strength"),
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
