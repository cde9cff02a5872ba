"""Captures what a function launches on a GPU, so that it can be replayed at once."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor


class Capture(Protocol):
    """Makes a function that can be replayed, of one that reads and writes the same tensors."""

    def __call__(
        self, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """What computes the function anew, and the tensors that its results come to be in.

        Raises:
            CaptureError: it cannot be captured.
        """
        ...


class CaptureError(RuntimeError):
    """What a function launches cannot be captured."""


class CudaCapture:
    """Captures on a stream of its own; all graphs share the memory between inputs and results."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # A pool is lost with its last graph, so one is kept whatever becomes of it.
        self._last: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """As every capture's; see `Capture`.

        Raises:
            CaptureError: it cannot be captured.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()  # libraries set themselves up in a first call, which none may capture
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the device meanwhile, as reading an intervention does.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    results = function()
            except Exception as error:
                # Where a capture has failed, its stream stays the current one, and its pool open.
                torch.cuda.set_stream(current)
                # Where it stays open, torch captures nothing any more in this process.
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
                self._begin_anew()
                raise CaptureError(_cause(error)) from error
        self._last = graph
        return graph.replay, results


def _cause(error: BaseException) -> str:
    """What a capture has failed of; the last error says no more than that something failed."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"
