"""Registers functions as torch operators, which compilers call without tracing into them.

`torch.library.custom_op` does the same, with several times the overhead in each call.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_NAMESPACE: Final = "steerserve"
# Kept for the whole process: torch removes an operator together with its library.
_LIBRARY: Final = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define_operator(
    schema: str,
    function: Callable[..., Tensor | None],
    fake: Callable[..., Tensor | None],
    backends: tuple[str, ...],
) -> None:
    """Register a function as `torch.ops.steerserve.<name>`.

    Args:
        schema: the operator's name, arguments and result, in torch's schema language.
        function: computes the operator.
        fake: returns an empty tensor of the result's shape, for compilers, or None without one.
        backends: the dispatch keys for which `function` computes the operator.
    """
    name = schema.partition("(")[0]
    library: Any = _LIBRARY
    library.define(schema)
    for backend in backends:
        library.impl(name, function, backend)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)


def use_on_gpus(name: str, function: Callable[..., Tensor | None]) -> None:
    """Register an operator's function for NVIDIA GPUs, unless it has one."""
    library: Any = _LIBRARY
    dispatch: Any = torch._C
    if not dispatch._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", "CUDA"):
        library.impl(name, function, "CUDA")
