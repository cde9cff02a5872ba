"""The baselines that the bundled interventions are compared with: fitted once, and uploaded."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import httpx

from benchmarks.decoding import BenchmarkError
from benchmarks.effect.arms import STRENGTHS
from benchmarks.processes import ROOT
from server.evaluating.files import read_file

SOURCE: Final = "about_to_swear.txt"
TARGET: Final = "calm.txt"

# The methods' papers pool so.
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "caa": ("--pooling", "last", "--max-strength", str(max(STRENGTHS["caa"]))),
    "mean-act": ("--pooling", "mean"),
    "lin-act": ("--pooling", "mean"),
}
# With more texts than one forward pass takes, these fits take passes of their own for each site.
_SITE_AFTER_SITE: Final = ("mean-act", "lin-act")
_TEXTS_IN_A_PASS: Final = 256


def fit_baselines(model: str, work: Path) -> dict[str, Path]:
    """Fit each baseline from SOURCE to TARGET of the folder; return the artifacts by name.

    An artifact's name says what it was fitted on and how, and one that is there already is kept.

    Raises:
        BenchmarkError: a training file is missing, or a fit failed.
        EvaluationInputError: a training file cannot be read.
    """
    for name in (SOURCE, TARGET):
        if not (work / name).exists():
            raise BenchmarkError(
                f"{work / name} is missing: make it with `python -m benchmarks.bundled_data`"
            )
    files = [read_file(work / name) for name in (SOURCE, TARGET)]
    hashes = [file.sha256 for file, _ in files]
    texts = min(_TEXTS_IN_A_PASS, *(text.count("\n") for _, text in files))
    paths = {}
    for name, own in _OPTIONS.items():
        options = (*own, "--samples", str(texts)) if name in _SITE_AFTER_SITE else own
        fitted = hashlib.sha256(repr((model, hashes, options)).encode()).hexdigest()
        paths[name] = work / f"{name}-{fitted[:12]}.safetensors"
        if not paths[name].exists():
            _fit(name, options, model, work, paths[name])
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


def _fit(name: str, options: Sequence[str], model: str, work: Path, path: Path) -> None:
    print(f"fitting {name}", file=sys.stderr)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "server", "fit", name, "--model", model, "--out", str(path)),
            *("--source", str(work / SOURCE), "--target", str(work / TARGET), "--name", name),
            *("--dtype", "float32", *options),
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
