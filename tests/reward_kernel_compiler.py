"""Compiles the reward kernels for GPUs that are not present; prints their resources as JSON.

The arguments are compute capabilities:

python -m tests.reward_kernel_compiler 80 90
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steering.grouped_refinement import TILE_ROWS
from steering.kernels import reward_triton as launches
from steering.kernels.reward_rows import ascend_kernel, directional_step_kernel
from steering.kernels.reward_tiles import finish_kernel, gram_slopes_kernel, units_kernel

UNITS: Final = 1024  # number of hidden units of ARGRE's reward heads
_TYPES: Final = {"table": "*i64", "slots": "*i32", "tile_sizes": "*i32"} | dict.fromkeys(
    ("width", "max_units", "gram_slopes_stride", "scales_stride", "sizes_stride", "most"), "i32"
)
# Arguments whose alignment differs from step to step, because they are views of one table.
_UNALIGNED: Final = {
    "scales",
    "sizes",
    "scales_stride",
    "sizes_stride",
    "most",
    "slots",
    "tile_sizes",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as it is launched for heads of UNITS units."""

    name: str
    kernel: Any
    constants: Mapping[str, int]
    warps: int


_TILE = {"tile_rows": TILE_ROWS}
_MIXED = {"stages": launches.MIXED_STAGES, **_TILE}
_SPLITS = {"splits": launches.SPLITS}
CASES = (
    Case(
        "units",
        units_kernel,
        {**launches.UNITS_BLOCK, **_TILE, "stages": launches.UNITS_STAGES},
        launches.TILE_WARPS,
    ),
    Case(
        "directional_step",
        directional_step_kernel,
        {"block_units": UNITS},
        launches.row_warps(UNITS),
    ),
    Case(
        "gram_slopes",
        gram_slopes_kernel,
        {**launches.GRAM_BLOCK, **_MIXED, **_SPLITS},
        launches.TILE_WARPS,
    ),
    Case(
        "ascend",
        ascend_kernel,
        {"block_units": UNITS, "block_flips": launches.FLIPS, **_SPLITS},
        launches.row_warps(UNITS),
    ),
    Case("finish", finish_kernel, {**launches.FINISH_BLOCK, **_MIXED}, launches.TILE_WARPS),
)


def compiled(case: Case, capability: int) -> dict[str, object]:
    """Return a kernel's shared memory, threads, registers, spills and widest cp.async, in bytes."""
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else _TYPES.get(name, "*fp32") for name in names
    }
    aligned = set(names) - set(case.constants) - _UNALIGNED
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.warps},
    )
    said = _assembler(made.asm["ptx"])
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", made.asm["ptx"])
    return {
        "shared": made.metadata.shared,
        "threads": 32 * case.warps,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "widest_copy": max((int(each, 16) for each in copied), default=0),
    }


def _assembler(ptx: str) -> str:
    """Return the verbose output of Triton's own ptxas for a kernel."""
    [target] = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        made = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                f"--gpu-name={target}",
                str(source),
                "-o",
                str(source.with_suffix(".cubin")),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    return made.stdout + made.stderr


if __name__ == "__main__":
    rows = [
        {"capability": each, "kernel": case.name, **compiled(case, int(each))}
        for each in sys.argv[1:]
        for case in CASES
    ]
    sys.stdout.write(json.dumps(rows))
