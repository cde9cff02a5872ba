"""Runs `steerserve fit` on a folder of small training files."""

from pathlib import Path

from typer.testing import CliRunner, Result

from server.__main__ import app

PAIRS = [
    {"prompt": "you are ", "positive": "kind", "negative": "awful"},
    {"positive": "a fine day", "negative": "a vile day"},
    {"prompt": "", "positive": "good", "negative": "bad"},
]


def fit_lineas_by_command(model: str, folder: Path, *more: str) -> Result:
    files = {"--source": "toxic.txt", "--target": "neutral.txt", "--out": "tiny-lineas.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    small = ["--model", model, "--dtype", "float32", "--samples", "3", "--steps", "3"]
    return CliRunner().invoke(app, ["fit", "lineas", *options, *small, *more])


def fit_argre_by_command(model: str, folder: Path, *more: str) -> Result:
    files = {"--pairs": "pairs.jsonl", "--out": "tiny-argre.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    small = ["--model", model, "--dtype", "float32", "--hidden-units", "16"]
    return CliRunner().invoke(app, ["fit", "argre", *options, *small, *more])


def fit_by_command(method: str, model: str, folder: Path, *more: str) -> Result:
    """Run `steerserve fit` with one of the methods that need no training."""
    files = {"--source": "toxic.txt", "--target": "neutral.txt", "--out": f"{method}.safetensors"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    return CliRunner().invoke(
        app, ["fit", method, *options, "--model", model, "--dtype", "float32", *more]
    )
