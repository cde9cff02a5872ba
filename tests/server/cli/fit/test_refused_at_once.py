"""Tests of the options that end up in a manifest: what it cannot hold is refused before a fit."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from interventions.artifact import read_artifact
from interventions.manifest import MOST_IN_DESCRIPTION, MOST_IN_LABEL
from server.__main__ import app
from server.cli.fit import output
from tests.fitting import (
    fit_argre_by_command,
    fit_by_command,
    fit_lineas_by_command,
)

NOT_UTF8 = "\udcff"  # as Python has a byte that is not UTF-8 in an argument
BASELINES = ("lin-act", "mean-act", "caa", "iti")
COMMANDS = ("lineas", "argre", "gate", *BASELINES)


def _fit(command: str, model: str, folder: Path, *more: str) -> Result:
    match command:
        case "lineas":
            return fit_lineas_by_command(model, folder, *more)
        case "argre":
            return fit_argre_by_command(model, folder, *more)
        case "gate":
            files = {"--source": "toxic.txt", "--control": "neutral.txt", "--out": "g.safetensors"}
            options = [part for name, file in files.items() for part in (name, str(folder / file))]
            maps = str(folder / "tiny-lineas.safetensors")
            small = ["--model", model, "--dtype", "float32", "--gate-components", "1"]
            return CliRunner().invoke(app, ["fit", "gate", maps, *options, *small, *more])
    return fit_by_command(command, model, folder, *more)


def _assert_refused_at_once(result: Result, before: list[Path], folder: Path, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    shown = " ".join(result.stderr.split())
    assert all(part in shown for part in parts), result.stderr
    assert "Traceback" not in result.output
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def maps(model: str, folder: Path) -> None:
    """Maps, for `fit gate`."""
    assert fit_lineas_by_command(model, folder).exit_code == 0


@pytest.fixture
def no_model(maps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_options: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(output, "load", loaded)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--description", "x" * 10_001, "has 10001 characters: give at most 10000"),
        ("--license", "x" * 301, "has 301 characters: give at most 300"),
        ("--description", NOT_UTF8, r"is not UTF-8: '\udcff'"),
        ("--license", NOT_UTF8, r"is not UTF-8: '\udcff'"),
        ("--license", " ", "must name a licence"),
        ("--name", "a\n", "'a\\n' is not a name"),
        ("--name", "x" * 65, "is not a name"),
        ("--seed", str(2**64), "seed"),
        ("--threads", "100000", "threads"),
    ],
)
def test_an_option_of_every_command(
    model: str, folder: Path, command: str, option: str, value: str, message: str
) -> None:
    before = sorted(folder.iterdir())
    result = _fit(command, model, folder, option, value)
    _assert_refused_at_once(result, before, folder, option, message)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_could_not_be_printed(model: str, folder: Path, command: str) -> None:
    before = sorted(folder.iterdir())
    out = str(folder / f"{NOT_UTF8}.safetensors")
    result = _fit(command, model, folder, "--name", "x", "--out", out)
    _assert_refused_at_once(result, before, folder, "--out is not UTF-8")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["lineas", *BASELINES])
@pytest.mark.parametrize("pattern", ["x" * 32_769, f"(.*|{NOT_UTF8})"])
def test_sites_that_no_manifest_could_record(
    model: str, folder: Path, command: str, pattern: str
) -> None:
    before = sorted(folder.iterdir())
    result = _fit(command, model, folder, "--sites", pattern)
    _assert_refused_at_once(result, before, folder, "--sites")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("lineas", ("--strength", "1.5"), "--strength"),
        ("lineas", ("--gate", "end-to-end", "--control-weight", "nan"), "--control-weight"),
        ("lineas", ("--gate", "end-to-end", "--control-weight", "0"), "--control-weight"),
        ("lineas", ("--gate", "regression", "--gate-min-accuracy", "nan"), "gate-min-accuracy"),
        ("gate", ("--gate-min-accuracy", "nan"), "gate-min-accuracy"),
        ("gate", ("--gate-l2", "nan"), "l2 must be a positive number"),
        ("gate", ("--strength", "5"), "--strength"),
        ("lin-act", ("--quantiles", "nan", "1"), "quantiles"),
        ("caa", ("--strength", "5"), "--strength"),
        ("iti", ("--strength", "50"), "--strength"),
        ("iti", ("--held-out", "nan"), "held_out"),
        ("argre", ("--eta", "nan"), "eta"),
        ("argre", ("--eta", "11"), "eta"),
        ("argre", ("--iterations", "65"), "iterations"),
        ("argre", ("--direction-scale", "inf"), "direction-scale"),
        ("argre", ("--reward-quantile", "nan"), "reward_quantile"),
    ],
)
def test_an_option_of_one_command(
    model: str, folder: Path, command: str, options: tuple[str, ...], message: str
) -> None:
    before = sorted(folder.iterdir())
    result = _fit(command, model, folder, *options)
    _assert_refused_at_once(result, before, folder, message)


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_longest_texts_and_the_greatest_seed_are_taken(
    model: str, folder: Path, command: str
) -> None:
    description, license_ = "ü" * MOST_IN_DESCRIPTION, "x" * MOST_IN_LABEL
    seed = str(2**64 - 1)
    result = _fit(
        command,
        model,
        folder,
        *("--description", description, "--license", license_, "--seed", seed, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    manifest = read_artifact(Path(json.loads(result.stdout)["path"])).manifest
    assert (manifest.description, manifest.license) == (description, license_)


@pytest.mark.usefixtures("maps")
@pytest.mark.parametrize(("command", "option"), [("caa", "--source"), ("gate", "--control")])
def test_a_training_files_name_may_be_of_any_bytes(
    model: str, folder: Path, command: str, option: str
) -> None:
    file = folder / f"some{NOT_UTF8}.txt"
    file.write_text("the sea\nthe land\nthe air\n")
    result = _fit(command, model, folder, option, str(file), "--json")
    assert result.exit_code == 0, result.stderr
    training = read_artifact(Path(json.loads(result.stdout)["path"])).manifest.training
    assert "some?.txt" in training.values()
