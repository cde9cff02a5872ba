"""Compiles the affine kernel for GPUs that are not present, and prints its resource use as JSON.

The arguments are compute capabilities:

python -m tests.affine_compiler 80 90
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steering.kernels.affine_triton import _constants, _edit_kernel, _options

WIDTHS = (576, 4096, 8192, 28672)  # of SmolLM2, Llama 8B, Llama 70B, and Llama 70B's MLP
DTYPES = ("bf16", "fp32")  # Triton's names
_TABLES = (
    "delta",
    "bias",
    "low",
    "high",
    "gate_weight",
)  # float32, at addresses that are multiples of 16
_OTHERS = {"slots": "*i64", "extent": "*i64", "flags": "*i32"} | dict.fromkeys(
    ("strength", "gate_bias", "doses"), "*fp32"
)


def compiled(
    capability: int, width: int, dtype: str, has_doses: bool, is_routed: bool
) -> dict[str, object]:
    """Compile the kernel for a GPU of some compute capability.

    Returns its registers and stack bytes per thread, its shared memory, and whether it reads 16
    bytes at once.
    """
    constants = _constants(width, has_doses, is_routed)
    # When the kernel is launched, Triton sees that these addresses are multiples of 16 bytes.
    aligned = dict.fromkeys(("edited", "activations"), f"*{dtype}") | dict.fromkeys(
        _TABLES, "*fp32"
    )
    types = _OTHERS | aligned | dict.fromkeys(constants, "constexpr")
    names = _edit_kernel.arg_names
    made = triton.compile(
        ASTSource(
            _edit_kernel,
            {name: types.get(name, "i32") for name in names},
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=_options(width),
    )
    return {
        **_taken(made.asm["cubin"]),
        "shared": made.metadata.shared,
        "wide_reads": re.search(r"ld\.global\S*\.v4\.b32", made.asm["ptx"]) is not None,
    }


def _taken(machine_code: bytes) -> dict[str, int]:
    tool: Any = triton.knobs.nvidia.cuobjdump
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(machine_code)
        listed = subprocess.run(
            [tool.path, "-res-usage", path], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", listed))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"])}


if __name__ == "__main__":
    # An edit in place by a step's route can always tell its doses.
    kinds = ((False, False), (True, False), (True, True))
    rows = [
        {
            "capability": each,
            "width": width,
            "dtype": dtype,
            "doses": has_doses,
            "routed": is_routed,
        }
        | compiled(int(each), width, dtype, has_doses, is_routed)
        for each, width, dtype, (has_doses, is_routed) in product(
            sys.argv[1:], WIDTHS, DTYPES, kinds
        )
    ]
    sys.stdout.write(json.dumps(rows))
