"""What Triton makes of kernels for GPUs that are not there."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.processes import ROOT


def compiled_for_gpus(compiler: str) -> list[dict[str, Any]]:
    """What a module of the tests tells of its kernels, compiled for an A100 and an H100.

    It runs in a process of its own: in this one, Triton interprets its kernels.
    """
    made = subprocess.run(
        [sys.executable, "-m", f"tests.{compiler}", "80", "90"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    rows: list[dict[str, Any]] = json.loads(made.stdout)
    assert {row["capability"] for row in rows} == {"80", "90"}
    return rows
