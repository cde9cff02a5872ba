"""What refines a single row, compiled for each shape of a reward head."""

import torch

from server.engine.torch.ahead import compare, compile_ahead, warn_uncompiled
from server.engine.torch.background import Background
from steering.prepared_head import PreparedHead
from steering.refine import Begin, begin_one_row


class CompiledRefinement:
    """`begin_one_row`, made in the background for whoever first has a head of a shape."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._asked: set[torch.Size] = set()
        self._made: dict[torch.Size, Begin] = {}

    def __call__(self, head: PreparedHead) -> Begin | None:
        """What begins a row by this head; None as long as there is nothing."""
        shape = head.w1.shape
        if shape not in self._asked:
            self._asked.add(shape)
            self._background.run(lambda: self._make(head))
        return self._made.get(shape)

    def _make(self, head: PreparedHead) -> None:
        """On the background's thread."""
        random = torch.Generator().manual_seed(0)
        rows = torch.randn(1, head.w1.shape[1], generator=random), torch.ones(1, 1)
        try:
            with torch.inference_mode():
                begin = compile_ahead(
                    begin_one_row, rows, torch.get_num_threads(), named=head.one_row
                )
                compare(begin(*rows, **head.one_row), begin_one_row(*rows, **head.one_row))
        except Exception as error:
            warn_uncompiled("rewards run", head.w1.shape, error)
        else:
            self._made[head.w1.shape] = begin
