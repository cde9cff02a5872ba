"""Tests of `steerserve import`: artifacts that are served, and refusals in one sentence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from interventions.artifact import Artifact, read_artifact
from interventions.compatibility import check_compatible
from interventions.manifest import AffineManifest, RewardManifest
from server.__main__ import app
from server.cli import import_files
from server.engine.request import Edit
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings, RewardSettings
from tests.conftest import LoadTiny, StartEngine
from tests.foreign_files import (
    argre_head,
    gaussian_state,
    linear_state,
    random_tensor,
    write_argre,
    write_control_vector,
    write_gemma_scope,
    write_hooks,
    write_sae_lens,
    write_svec,
)
from tests.steered import assert_equal_to_stack, generate, tokens_of
from tests.tiny import SITES, WIDTH

PROMPT = b"hello world, how are you?"
VECTORS = {layer: random_tensor(layer, WIDTH) for layer in range(2)}


def import_file(model: Path, command: str, path: Path, out: Path, *more: str) -> Result:
    options = ["--model", str(model), "--out", str(out)]
    return CliRunner().invoke(app, ["import", command, str(path), *options, *more])


def write_one(command: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write a file that a command takes; return it, and the options that the command needs."""
    match command:
        case "ml-lineas":
            return write_hooks(folder / "maps", {site: linear_state(1) for site in SITES}), ()
        case "ml-act":
            state = gaussian_state(1, quantiles="q_5_95")
            path = write_hooks(folder / "maps", dict.fromkeys(SITES, state))
            return path, ("--map", "gaussian")
        case "argre":
            return write_argre(folder / "head", argre_head(1)), ("--iterations", "3")
        case "control-vector":
            return write_control_vector(folder / "v.gguf", VECTORS), ("--layers", "0-1")
        case "svec":
            return write_svec(folder / "v.svec", VECTORS), ("--layers", "0-1", "--strength", "-2")
        case "sae":
            config = {"hook_name": "blocks.1.hook_resid_post"}
            path = write_sae_lens(folder / "sae", random_tensor(2, 5, WIDTH), config)
            return path, ("--feature", "3", "--scale", "2")
    raise ValueError(command)


METHODS = {
    "ml-lineas": "lineas",
    "ml-act": "gaussian-act",
    "argre": "argre",
    "control-vector": "caa",
    "svec": "caa",
    "sae": "sae",
}


@pytest.fixture(params=METHODS)
def imported(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> tuple[str, Artifact, dict[str, Any]]:
    """Import a file; return the command, the artifact and the printed summary."""
    path, options = write_one(request.param, tmp_path)
    out = tmp_path / "made.safetensors"
    result = import_file(tiny_folders["llama"], request.param, path, out, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return request.param, read_artifact(out), json.loads(result.stdout)


async def test_an_imported_artifact_is_served(
    imported: tuple[str, Artifact, dict[str, Any]], load_tiny: LoadTiny, start_engine: StartEngine
) -> None:
    command, artifact, summary = imported
    manifest = artifact.manifest
    assert manifest.method == METHODS[command]
    assert manifest.name == summary["name"] == "made"
    assert summary["digest"] == f"sha256:{artifact.digest}"
    assert manifest.license == "NOASSERTION"
    assert {"imported_from", "steerserve"} <= manifest.training.keys()
    assert check_compatible(artifact, load_tiny().description) == ()
    settings: AffineSettings | RewardSettings
    if isinstance(manifest, RewardManifest):
        assert manifest.defaults.iterations == 3
        settings = RewardSettings(manifest.defaults.eta, 3)
    else:
        vector = command in ("control-vector", "svec", "sae")
        assert manifest.limits.strength == ((-10.0, 10.0) if vector else (0.0, 1.0))
        assert manifest.defaults.strength == (-2 if command == "svec" else 1)
        settings = AffineSettings(manifest.defaults.strength)
    options = EngineOptions(kv_cache_gb=0.01)
    engine = await start_engine({"made": artifact.parameters}, options=options)
    outputs = await generate(engine, PROMPT, (Edit("made", settings),))
    assert_equal_to_stack(outputs, "llama", PROMPT, [(artifact.parameters, settings)])
    assert tokens_of(outputs) != tokens_of(await generate(engine, PROMPT))


@pytest.mark.parametrize(
    ("command", "limits"), [("ml-lineas", (0.0, 4.0)), ("control-vector", (-4.0, 4.0))]
)
def test_a_greater_strength_may_be_allowed(
    command: str, limits: tuple[float, float], tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    path, options = write_one(command, tmp_path)
    out = tmp_path / "made.safetensors"
    strengths = ("--strength", "3", "--max-strength", "4")
    result = import_file(tiny_folders["llama"], command, path, out, *options, *strengths)
    assert result.exit_code == 0, result.stderr
    manifest = read_artifact(out).manifest
    assert isinstance(manifest, AffineManifest)
    assert (manifest.defaults.strength, manifest.limits.strength) == (3.0, limits)


def test_the_manifest_names_no_folder_of_this_machine(
    imported: tuple[str, Artifact, dict[str, Any]], tmp_path: Path
) -> None:
    assert str(tmp_path.parent) not in imported[1].manifest.model_dump_json()


def test_ml_act_tells_mean_from_gaussian_by_the_folder(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    folder = write_hooks(tmp_path / "incr-mean_ot-mean", {SITES[0]: gaussian_state(1)})
    out = tmp_path / "x.safetensors"
    assert import_file(tiny_folders["llama"], "ml-act", folder, out).exit_code == 0
    assert read_artifact(out).manifest.method == "mean"


def test_ml_act_quantiles_and_gemma_scope_and_argre_folders(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    model, out = tiny_folders["llama"], tmp_path / "x.safetensors"
    folder = write_hooks(tmp_path / "maps", {SITES[0]: linear_state(1)})
    assert import_file(model, "ml-act", folder, out, "--quantiles", "q_0_100").exit_code == 0
    [map_] = read_artifact(out).parameters.values()  # type: ignore[union-attr]
    assert map_.low is not None
    npz = write_gemma_scope(tmp_path / "params.npz", random_tensor(2, 5, WIDTH))
    options = ("--feature", "1", "--site", "model.layers.1.mlp")
    assert import_file(model, "sae", npz, out, *options).exit_code == 0
    states = write_argre(tmp_path / "states", argre_head(1))
    (tmp_path / "head").mkdir()
    head = (states / "best_score_model.pth").rename(tmp_path / "head" / "best_score_model.pth")
    assert import_file(model, "argre", head.parent, out).exit_code == 2
    assert import_file(model, "argre", head.parent, out, "--hidden-dir", str(states)).exit_code == 0


@pytest.mark.parametrize("command", METHODS)
def test_another_model_is_refused_and_nothing_is_written(
    tmp_path: Path, tiny_folders: Mapping[str, Path], command: str
) -> None:
    path, options = write_one(command, tmp_path)
    out = tmp_path / "made.safetensors"
    wrong = {"argre": "opt-350m", "ml-lineas": "gpt2", "ml-act": "gpt2"}
    if command in wrong:
        result = import_file(tiny_folders[wrong[command]], command, path, out, *options)
    else:
        options = tuple("9" if option == "0-1" else option for option in options)
        if command == "sae":
            options = (*options, "--site", "model.layers.9")
        result = import_file(tiny_folders["llama"], command, path, out, *options)
    assert result.exit_code == 2, result.output
    *_, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert str(path) in line
    assert "Traceback" not in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "11"), "the default strength 11 lies outside of [-10, 10]"),
        (("--strength", "nan"), "the default strength nan lies outside of [-10, 10]"),
        (("--max-strength", "0.5"), "the default strength 1 lies outside of [-0.5, 0.5]"),
        (("--layers", "a"), "no list of numbers"),
        (("--layers", "7"), "no direction for layer 7"),
        (("--place", "mlp"), "mlp"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--out", "x.bin"), "must end in .safetensors"),
        (("--name", "no/slash"), "'no/slash' is not a name"),
        (("--license", ""), "--license"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    tmp_path: Path, tiny_folders: Mapping[str, Path], options: tuple[str, ...], message: str
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", VECTORS)
    out = tmp_path / "x.safetensors"
    result = import_file(tiny_folders["llama"], "control-vector", path, out, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--description", "x" * 10_001, "--description has 10001 characters: give at most 10000"),
        ("--description", "\udcff", "--description is not UTF-8"),
        ("--license", "x" * 301, "--license has 301 characters: give at most 300"),
        ("--license", "\udcff", "--license is not UTF-8"),
        ("--license", "", "--license must name a licence"),
    ],
)
@pytest.mark.parametrize(
    "command", ["ml-lineas", "ml-act", "argre", "control-vector", "svec", "sae"]
)
def test_what_no_manifest_holds_is_refused_before_the_model_is_described(
    tmp_path: Path,
    tiny_folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    option: str,
    value: str,
    message: str,
) -> None:
    def described(_model: str) -> None:
        raise AssertionError("the model is described")

    monkeypatch.setattr(import_files, "describe", described)
    path, options = write_one(command, tmp_path)
    out = tmp_path / "x.safetensors"
    result = import_file(tiny_folders["llama"], command, path, out, *options, option, value)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"Error: {message}")
    assert not out.exists()


def test_the_file_of_another_project_is_not_overwritten(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    path, options = write_one("sae", tmp_path)
    weights = path / "sae_weights.safetensors"
    before = weights.read_bytes()
    result = import_file(tiny_folders["llama"], "sae", path, weights, *options)
    assert result.exit_code == 2
    assert "would be overwritten" in result.stderr
    assert weights.read_bytes() == before


def test_a_positive_reward_that_is_no_number(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    folder = write_argre(tmp_path / "head", argre_head(1))
    out = tmp_path / "x.safetensors"
    result = import_file(tiny_folders["llama"], "argre", folder, out, "--positive-reward", "nan")
    assert result.exit_code == 2
    assert "the given positive reward is not a finite number" in result.stderr
    assert not out.exists()
    torch.save(torch.zeros(3), folder / "direction.pt")
    result = import_file(tiny_folders["llama"], "argre", folder, out)
    assert "direction.pt" in result.stderr
