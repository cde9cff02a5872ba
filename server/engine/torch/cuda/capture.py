"""Captures a function's launches on a GPU in a CUDA graph, which replays them at once."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor

Launches: TypeAlias = Callable[[], Sequence[Tensor]]
Capture: TypeAlias = Callable[[Launches], tuple[Callable[[], None], Sequence[Tensor]]]
"""Captures a function, which must read and write the same tensors each time.

Returns a function that replays it, and the tensors that each replay writes its results to. Raises
CaptureError if the function cannot be captured.
"""


class CaptureError(RuntimeError):
    """A function's launches cannot be captured."""


class CudaCapture:
    """Captures on a stream of its own, with one memory pool for the tensors of all graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # torch frees a pool with its last graph, so the newest graph is kept alive here.
        self._last: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Launches) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Capture a function; see `Capture`.

        Raises:
            CaptureError: the function cannot be captured.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()  # libraries initialize in a first call, which cannot be captured
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # In this mode other threads may use the device meanwhile, as for loading a map.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    results = function()
            except Exception as error:
                # After a failed capture torch leaves its stream current and its pool open.
                torch.cuda.set_stream(current)
                # With an open pool torch captures nothing any more in this process.
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
                self._begin_anew()
                raise CaptureError(_cause(error)) from error
        self._last = graph
        return graph.replay, results


def _cause(error: BaseException) -> str:
    """Describe the first error of a chain; the last one says only that the capture failed."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"
