"""The baselines that the bundled interventions are compared with: fitted once, and uploaded."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpx

from benchmarks.decoding import BenchmarkError
from benchmarks.effect.arms import STRENGTHS
from benchmarks.processes import ROOT
from interventions.artifact import read_manifest
from interventions.header import ArtifactError
from server.evaluating.files import read_file

SOURCE: Final = "about_to_swear.txt"
TARGET: Final = "calm.txt"

# The sources are cut just before a harmful word: what tells the sides apart is what the model is
# about to say at the last token.
_POOLING: Final = "last"
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "caa": ("--max-strength", str(max(STRENGTHS["caa"]))),
    "mean-act": (),
    "lin-act": (),
}


def fit_baselines(model: str, work: Path) -> dict[str, Path]:
    """Fit each baseline from SOURCE to TARGET of the folder; return the artifacts by name.

    One that lies there already is kept if it was fitted on these files in this way.

    Raises:
        EvaluationInputError: a training file cannot be read.
        BenchmarkError: a fit failed.
    """
    hashes = [read_file(work / name)[0].sha256 for name in (SOURCE, TARGET)]
    paths = {name: work / f"baseline-{name}.safetensors" for name in _OPTIONS}
    for name, path in paths.items():
        if not _fitted_on(path, hashes):
            _fit(name, model, work, path)
    return paths


def upload(url: str, name: str, path: Path) -> None:
    """Store an artifact in a server's registry.

    Raises:
        BenchmarkError: the server refuses it, or cannot serve it.
    """
    answer = httpx.post(
        f"{url}/v1/interventions",
        files={"file": (path.name, path.read_bytes())},
        data={"name": name},
        timeout=60,
    )
    if answer.is_error or not answer.json()["servable"]:
        raise BenchmarkError(f"{path} cannot be served: {answer.text}")


def offered(url: str) -> list[str]:
    """Return the names of the interventions that a server can apply."""
    listed = httpx.get(f"{url}/v1/interventions", timeout=60).raise_for_status().json()
    return [each["name"] for each in listed["data"] if each["servable"]]


def _fitted_on(path: Path, hashes: list[str]) -> bool:
    try:
        training = read_manifest(path).training
    except ArtifactError:  # also where there is none
        return False
    found = [training.get(key) for key in ("source_sha256", "target_sha256", "pooling")]
    return found == [*hashes, _POOLING]


def _fit(name: str, model: str, work: Path, path: Path) -> None:
    print(f"fitting {name}", file=sys.stderr)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "server", "fit", name, "--model", model, "--out", str(path)),
            *("--source", str(work / SOURCE), "--target", str(work / TARGET), "--name", name),
            *("--dtype", "float32", "--pooling", _POOLING, *_OPTIONS[name]),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"fit {name} failed: {done.stderr.strip()}")
