"""Compiles Triton kernels for GPUs that this machine does not have."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.processes import ROOT


def compiled_for_gpus(compiler: str) -> list[dict[str, Any]]:
    """Compile the kernels of a tests' module for an A100 and an H100; return what it prints.

    The module runs in another process, because Triton interprets its kernels in this one.
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
