"""Functions of ours as operators of torch, which a compiled graph calls as they are.

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
    schema: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Make a function `torch.ops.steerserve.<name>`, for tensors on a CPU.

    Args:
        schema: name, arguments and result, as torch writes them.
        fake: gives an empty tensor of the result's shape, for the compiler.
    """
    name = schema.partition("(")[0]
    library: Any = _LIBRARY
    library.define(schema)
    for backend in ("CPU", "MkldnnCPU"):
        library.impl(name, function, backend)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
