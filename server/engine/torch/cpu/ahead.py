"""Compiles functions for a CPU ahead of their first call, and compares results with the original's.

torch's compiler turns a function's tensor operations into C++ loops.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor.loop_body import InterpreterShim
from torch.utils._pytree import tree_leaves

from server.engine.torch.cpu.packed import MergeEqualProducts
from server.engine.torch.model.fallback import first_line

logger = logging.getLogger(__name__)

_OPTIONS: Final[Mapping[str, Any]] = {
    # The input of a one-row product is computed once, and not again for each row of weights.
    "realize_reads_threshold": 1,
    "compile_threads": 1,  # no pool of compiler processes
    "size_asserts": False,  # packed weights have no strides
    "post_grad_custom_pre_pass": MergeEqualProducts(),
    # Guards are needless: all that they check is constant here, except the number of tokens, which
    # is marked as dynamic.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}
# Largest relative difference of compiled and uncompiled outputs, in the norm.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 1e-2}


class CompiledWronglyError(Exception):
    """Compiled code gives other results than the code that it was made from."""


def prepare_compiler() -> None:
    """Make the compiler safe to run on one thread while another thread runs a model's modules.

    Call this while no other thread runs a module. The first code that torch's compiler generates
    makes an empty graph by `torch.fx.symbolic_trace`, which replaces `nn.Module.__call__` in the
    whole process for some milliseconds: a module that another thread calls then raises a NameError.
    torch keeps the graph, so it is made here. Everything else is traced by `PythonKeyTracer`, which
    calls the modules of other threads as ever.
    """
    make_empty_graph = getattr(InterpreterShim, "_dummy_gm", None)
    if make_empty_graph is not None:  # private, so another torch may do without it
        make_empty_graph()


def compile_ahead(
    function: Callable[..., object],
    inputs: tuple[object, ...],
    threads: int,
) -> Callable[..., Any]:
    """Compile a function for inputs like the given ones, and return the compiled function.

    It does not check its inputs: they may differ from `inputs` only in the values of tensors, and
    in the sizes that were marked as dynamic.

    Args:
        threads: how many threads a compiled loop over many elements uses.

    Raises:
        Exception: any; a compiler may raise what it likes.
    """
    # A new dict, because torch removes entries from it.
    options = {**_OPTIONS, "cpp.threads": threads}
    compiled: Any = torch.compile(function, fullgraph=True, options=options)
    # Python floats come from the model's code and configuration, so they are constants.
    with torch._dynamo.config.patch(specialize_float=True):
        ahead: Any = compiled.aot_compile((inputs, {}))
    ahead.disable_guard_check()
    call: Callable[..., Any] = ahead
    return call


def compare(got: object, expected: object) -> None:
    """Raise CompiledWronglyError unless two trees hold nearly the same tensors."""
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            difference, size = float((one - other).norm()), float(other.norm())
            if not difference <= _TOLERANCE[other.dtype] * size:
                raise CompiledWronglyError(
                    f"what was compiled is off by {difference:.2g} of {size:.2g}"
                )


def warn_uncompiled(who: str, part: object, error: Exception) -> None:
    """Log a warning that something runs uncompiled, because compiling it failed."""
    logger.warning(
        "%s uncompiled, which is slower, as with --no-compile-layers: %s", who, first_line(error)
    )
    logger.debug("compiling %s failed", part, exc_info=error)
