"""Functions of ours as operators of torch, which compilers and graphs call as they are.

`torch.library.custom_op` does the same with several times the overhead in each call.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_NAMESPACE: Final = "steerserve"
# An operator lives as long as the library that it was defined in.
_LIBRARY: Final = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define_operator(
    schema: str,
    function: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    backends: tuple[str, ...],
) -> None:
    """Make a function `torch.ops.steerserve.<name>`.

    Args:
        schema: name, arguments and result, as torch writes them.
        fake: gives an empty tensor of the result's shape, for the compiler.
        backends: torch's dispatch keys that the function computes for.
    """
    name = _name(schema)
    library: Any = _LIBRARY
    library.define(schema)
    for backend in backends:
        library.impl(name, function, backend)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)


def use_on_gpus(name: str, function: Callable[..., Tensor]) -> None:
    """Have a function compute an operator on NVIDIA GPUs, from now on; harmless when repeated."""
    library: Any = _LIBRARY
    dispatch: Any = torch._C
    if not dispatch._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", "CUDA"):
        library.impl(name, function, "CUDA")


def _name(schema: str) -> str:
    return schema.partition("(")[0]
