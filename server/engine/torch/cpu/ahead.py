"""Functions that are compiled before anybody calls them, for processors; and how they are checked.

torch's compiler makes loops for what a function says in tensors.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from server.engine.torch.cpu.packed import OneProduct
from server.engine.torch.model.fallback import first_line

logger = logging.getLogger(__name__)

_OPTIONS: Final[Mapping[str, Any]] = {
    # What a product of one row reads is computed once, and not again for each row of weights.
    "realize_reads_threshold": 1,
    "compile_threads": 1,  # no pool of processes
    "size_asserts": False,  # packed weights have no strides
    "post_grad_custom_pre_pass": OneProduct(),
    # All that guards would check is constant here, but for the number of tokens.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}
# Of what a layer gives, compiled and not, in the norm.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 1e-2}


class CompiledWronglyError(Exception):
    """What a compiler made gives other results."""


def compile_ahead(
    function: Callable[..., object],
    inputs: tuple[object, ...],
    threads: int,
) -> Callable[..., Any]:
    """What a compiler makes of a function, for inputs like some.

    What it gives checks nothing: inputs must differ from these in nothing but their numbers, and
    in the sizes that were marked as dynamic.

    Args:
        threads: that a loop over many numbers runs on.

    Raises:
        Exception: any; a compiler may raise what it likes.
    """
    # A copy: torch takes something out of it.
    options = {**_OPTIONS, "cpp.threads": threads}
    compiled: Any = torch.compile(function, fullgraph=True, options=options)
    # Numbers of the model's code are constants, as those of its configuration are.
    with torch._dynamo.config.patch(specialize_float=True):
        ahead: Any = compiled.aot_compile((inputs, {}))
    ahead.disable_guard_check()
    call: Callable[..., Any] = ahead
    return call


def compare(got: object, expected: object) -> None:
    """Raise CompiledWronglyError unless the tensors of two nests are the same, nearly."""
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            difference, size = float((one - other).norm()), float(other.norm())
            if not difference <= _TOLERANCE[other.dtype] * size:
                raise CompiledWronglyError(
                    f"what was compiled is off by {difference:.2g} of {size:.2g}"
                )


def warn_uncompiled(who: str, part: object, error: Exception) -> None:
    """Say that something runs as it is, which a compiler could not make faster."""
    logger.warning(
        "%s uncompiled, which is slower, as with --no-compile-layers: %s", who, first_line(error)
    )
    logger.debug("compiling %s failed", part, exc_info=error)
