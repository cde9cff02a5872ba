"""Compiles `lm_head` for steps that need the logits of a single row."""

import torch
from torch import nn

from server.engine.torch.cpu.ahead import compare, compile_ahead
from server.engine.torch.cpu.packed import PackedLinear, multiply_one_row


def compile_head(lm_head: nn.Module) -> None:
    """Have a packed `lm_head` multiply single rows by a compiled loop over its plain weights.

    An `lm_head` that is not packed, or has no plain weights, stays as it is.

    Raises:
        CompiledWronglyError: the loop gives other results.
        Exception: any; a compiler may raise what it likes.
    """
    if not isinstance(lm_head, PackedLinear) or lm_head.plain is None:
        return
    random = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, lm_head.in_features, generator=random).to(lm_head.plain.dtype)
    inputs = row, lm_head.plain, lm_head.bias
    one_row = compile_ahead(multiply_one_row, inputs, threads=torch.get_num_threads())
    # The module itself is not called, because its hook would edit the row by the route of the step
    # that runs at the same time.
    compare(one_row(*inputs), lm_head.multiply(row))
    lm_head.one_row = one_row
