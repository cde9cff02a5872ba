"""Compiles the attention kernels for GPUs that are not present; prints their resources as JSON.

The arguments are compute capabilities:

python -m tests.kernel_compiler 80 90
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_index import Tiling
from server.engine.torch.cuda.paged_kernel import _attend_kernel, _combine_kernel, _tile_keys


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of a model's attention, in prefill or decoding."""

    dtype: str  # Triton's name
    heads: int
    kv_heads: int
    head_dim: int
    bounded: bool  # whether there are a sliding window and a soft cap
    decoding: bool


MODELS = (
    ("bf16", 32, 8, 128, False),  # Llama 3 8B, Mistral 7B
    ("bf16", 32, 32, 96, True),  # Phi-3 mini, whose head_dim is no power of two
    ("bf16", 8, 4, 256, True),  # Gemma-2 2B
    ("fp32", 14, 2, 64, False),  # Qwen2.5 0.5B
)
CASES = [Case(*model, decoding) for model, decoding in product(MODELS, (False, True))]
_TENSORS = ("query", "keys", "values")
_INDICES = ("block_spans", "block_starts", "query_ends", "lengths", "tables")


def compiled(case: Case, capability: int) -> dict[str, object]:
    """Return the kernel's shared memory and code size, and whether it uses tensor cores."""
    itemsize = 4 if case.dtype == "fp32" else 2
    tiling = Tiling(case.heads, case.kv_heads, itemsize, processors=108)
    splits = 8 if case.decoding else 1
    block_dim = triton.next_power_of_2(case.head_dim)
    pointers = dict.fromkeys(_TENSORS, f"*{case.dtype}") | dict.fromkeys(_INDICES, "*i32")
    pointers |= {"output": "*fp32" if splits > 1 else f"*{case.dtype}"}
    pointers |= {"maxima": "*fp32", "sums": "*fp32"}
    constants = {
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "page": PAGE,
        "block_rows": tiling.block_rows(1 if case.decoding else 100),
        "block_keys": _tile_keys(block_dim * itemsize),
        "block_dim": block_dim,
        "is_split": splits > 1,
        "has_softcap": case.bounded,
        "has_window": case.bounded,
    }
    types = pointers | {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = _attend_kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    aligned = (*pointers, "query_token_stride", "query_head_stride")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = _compile(_attend_kernel, signature, constants, attributes, capability)
    code = made.asm["ptx"]
    return {
        "shared": made.metadata.shared,
        "tensor_cores": "mma.sync" in code or "wgmma" in code,
        "machine_code": len(made.asm["cubin"]),
    }


def combine_compiled(capability: int) -> dict[str, object]:
    """Return the shared memory and the code size of the kernel that combines the splits."""
    constants = {"head_dim": 96, "block_dim": 128, "splits": 16}
    types = {"output": "*bf16", "rows": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in _combine_kernel.arg_names}
    made = _compile(_combine_kernel, signature, constants, {}, capability)
    return {"shared": made.metadata.shared, "machine_code": len(made.asm["cubin"])}


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constants: Mapping[str, object],
    attributes: Mapping[tuple[int], Sequence[object]],
    capability: int,
) -> Any:
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 2},
    )


if __name__ == "__main__":
    rows = [
        {"capability": each, "dtype": case.dtype, **compiled(case, int(each))}
        for each in sys.argv[1:]
        for case in CASES
    ]
    rows += [
        {"capability": each, "dtype": None, "tensor_cores": False, **combine_compiled(int(each))}
        for each in sys.argv[1:]
    ]
    sys.stdout.write(json.dumps(rows))
