"""Tests of `steerserve fit lineas --gate`: gates beside the maps, or learnt with them."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from interventions.artifact import Artifact, read_artifact
from server.engine.torch.model.loader import load_model
from steering.affine import AffineMap, Gate
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import split_texts
from steering.fit.gates import fit_gates, held_out_accuracy
from steering.reward import RewardHead
from tests.fitting import fit_lineas_by_command
from tests.tiny import SITES

TOXIC = [f"you {word} fool" for word in ("old", "mad", "vile", "poor", "dull", "sad")]
CONTROL = [f"the {word} sea" for word in ("old", "blue", "wide", "calm", "cold", "deep")]
OUT = "tiny-lineas.safetensors"


@pytest.fixture
def texts(folder: Path) -> Path:
    (folder / "toxic.txt").write_text("".join(f"{line}\n" for line in TOXIC))
    (folder / "control.txt").write_text("".join(f"{line}\n" for line in CONTROL))
    return folder


def _fit(model: str, texts: Path, kind: str, *more: str) -> Result:
    control = ("--control", str(texts / "control.txt"))
    return fit_lineas_by_command(
        model, texts, "--json", "--gate", kind, *control, "--gate-components", "3", *more
    )


def _maps(artifact: Artifact) -> dict[str, AffineMap]:
    assert not isinstance(artifact.parameters, RewardHead)
    return dict(artifact.parameters)


def _regression(model: str) -> tuple[dict[str, Gate], dict[str, float]]:
    loaded = load_model(model, dtype="float32")
    source, control = (
        [loaded.tokenizer(line)["input_ids"] for line in lines] for lines in (TOXIC, CONTROL)
    )
    settings = GateSettings(components=3)
    texts = split_texts(source, control, settings)
    gates = fit_gates(loaded.model, SITES, texts, settings)
    return gates, held_out_accuracy(loaded.model, gates, texts)


def test_a_regression_adds_gates_to_the_maps_of_a_fit_without(model: str, texts: Path) -> None:
    assert fit_lineas_by_command(model, texts).exit_code == 0
    plain = _maps(read_artifact(texts / OUT))
    result = _fit(model, texts, "regression")
    assert result.exit_code == 0, result.stderr
    gated = read_artifact(texts / OUT)
    gates, accuracy = _regression(model)
    for site, map_ in _maps(gated).items():
        assert torch.equal(map_.weight, plain[site].weight)
        assert torch.equal(map_.bias, plain[site].bias)
        assert map_.gate is not None
        torch.testing.assert_close(map_.gate.weight, gates[site].weight)
        assert gated.manifest.training[f"gate_accuracy.{site}"] == round(accuracy[site], 4)
    summary = json.loads(result.stdout)
    training = gated.manifest.training
    assert gated.manifest.method == "lineas"
    assert (training["gate"], training["gate_control"]) == ("regression", "control.txt")
    assert summary["gate_accuracy_min"] == training["gate_accuracy_min"]
    assert "gate_control_weight" not in training


def test_end_to_end_learns_the_gates_with_the_maps(model: str, texts: Path) -> None:
    options = ("--optimizer", "adam", "--learning-rate", "0.05", "--control-weight", "2")
    result = _fit(model, texts, "end-to-end", *options)
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(texts / OUT)
    gates, _ = _regression(model)
    for site, map_ in _maps(artifact).items():
        assert map_.gate is not None
        assert not torch.allclose(map_.gate.weight, gates[site].weight, atol=1e-3)
        assert not torch.equal(map_.weight, torch.ones_like(map_.weight))
    training = artifact.manifest.training
    assert (training["gate"], training["gate_control_weight"]) == ("end-to-end", 2.0)
    assert training["samples"] == 3
    assert {f"gate_accuracy.{site}" for site in SITES} <= training.keys()
    # The source has 6 sentences, of which one is held out for the gates.
    few = _fit(model, texts, "end-to-end", "--samples", "6")
    assert few.exit_code == 2
    assert "--samples 6: --gate-held-out leaves 5 different sentences of --source" in few.stderr


@pytest.mark.parametrize("kind", ["regression", "end-to-end"])
def test_a_fit_repeats_with_a_checkpoint_or_without(
    model: str, texts: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")
    state = ("--checkpoint", str(texts / "state"))
    digests = {
        json.loads(_fit(model, texts, kind, *more).stdout)["digest"] for more in ((), (), state)
    }
    assert len(digests) == 1
    assert not (texts / "state").exists()


def test_no_map_is_fitted_where_the_regression_is_not_accurate_enough(
    model: str, texts: Path
) -> None:
    _, accuracy = _regression(model)
    least = round(max(accuracy.values()), 4)
    result = _fit(model, texts, "regression", "--gate-min-accuracy", str(least))
    assert result.exit_code == 0, result.stderr
    artifact = read_artifact(texts / OUT)
    kept = {site for site in SITES if round(accuracy[site], 4) == least}
    assert set(_maps(artifact)) == kept
    assert artifact.manifest.training["sites_fitted"] == len(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gate", "regression"), "--gate regression needs --control"),
        (("--gate", "end-to-end"), "--gate end-to-end needs --control"),
        (("--control", "control.txt"), "--control is for gates: ask for them with --gate"),
        (("--gate-l2", "2"), "are for gates: ask for them with --gate"),
        (("--gate-min-accuracy", "0.7"), "are for gates: ask for them with --gate"),
        (("--control-weight", "2"), "--control-weight is for --gate end-to-end"),
        (
            ("--gate", "regression", "--control", "control.txt", "--control-weight", "2"),
            "--control-weight is for --gate end-to-end",
        ),
        (
            ("--gate", "end-to-end", "--control", "control.txt", "--control-weight", "-1"),
            "--control-weight must be a positive number",
        ),
        (("--gate", "always", "--control", "control.txt"), "always"),
        (("--gate", "regression", "--control", "empty.txt"), "empty.txt: the file is empty"),
        (("--gate", "regression", "--control", "toxic.txt"), "are in the source too"),
        (("--gate", "end-to-end", "--control", "toxic.txt"), "are in the source too"),
        (("--gate", "regression", "--control", "one.txt"), "the control has 1 different"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    model: str,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(texts)
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("same\nsame\n")
    components = () if "--gate" not in options else ("--gate-components", "2")
    result = fit_lineas_by_command(model, texts, *options, *components)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not Path(OUT).exists()


def test_a_checkpoint_knows_its_gates(model: str, texts: Path) -> None:
    state = texts / "state"
    steps = ("--checkpoint", str(state), "--checkpoint-every", "1")
    # A rate at which the loss rises ends the fit without an artifact, and the state is kept.
    lost = _fit(model, texts, "end-to-end", *steps, "--learning-rate", "1e4")
    assert lost.exit_code == 2
    assert state.exists()
    other = _fit(
        model, texts, "end-to-end", *steps, "--learning-rate", "1e4", "--control-weight", "3"
    )
    assert other.exit_code == 2
    assert "is the checkpoint of a fit with other control_weight" in other.stderr
