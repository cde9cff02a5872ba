"""Measures the memory of tensors, without the allocator's or the machine's own."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most bytes that were alive at once, of tensors that operations returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._tensors: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._tensors[id(leaf)] = weakref.ref(leaf)
        self.peak = max(self.peak, self._alive())
        return result

    def _alive(self) -> int:
        alive = {key: tensor for key, ref in self._tensors.items() if (tensor := ref()) is not None}
        self._tensors = {key: self._tensors[key] for key in alive}
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in alive.values())
        }
        return sum(storages.values())
