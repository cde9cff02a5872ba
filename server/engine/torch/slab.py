"""Memory for keys and values on a CPU: one slab a sequence, slabs of one size side by side.

Side by side, so that one call attends for all sequences that decode, each to its own slab.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.attention_step import Lane
from server.engine.torch.devices import layer_devices

_SMALLEST: Final = 64  # tokens
_GROUP_TOKENS: Final = 8192  # memory is asked for in groups of so many, and used as it is written


@dataclass(frozen=True, slots=True)
class SlabShape:
    """What one token's keys and values are, and where each layer keeps them."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: Sequence[torch.device]  # one a layer

    @classmethod
    def of(cls, model: PreTrainedModel) -> "SlabShape":
        """The shape that a model's configuration tells; its layers are where they have been put."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=model.dtype,
            devices=layer_devices(model, config.num_hidden_layers),
        )

    @property
    def bytes_per_token_and_layer(self) -> int:
        """Memory of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in all layers."""
        return len(self.devices) * self.bytes_per_token_and_layer


class SlabGroup:
    """Slabs of one capacity: the first rows of `layers`, without a gap."""

    def __init__(self, shape: SlabShape, capacity: int, number: int) -> None:
        self.capacity = capacity
        self.number = number  # in the order in which groups were made
        self.slabs: list[Slab] = []  # by row
        self._rows = max(1, _GROUP_TOKENS // capacity)
        size = (2, self._rows, shape.kv_heads, capacity, shape.head_dim)
        # A layer's keys, then its values: (2, rows, kv_heads, capacity, head_dim).
        self.layers = [torch.empty(size, dtype=shape.dtype, device=each) for each in shape.devices]

    @property
    def full(self) -> bool:
        """Whether every row is taken."""
        return len(self.slabs) == self._rows

    def add(self, slab: "Slab") -> None:
        """Give a slab the next row."""
        slab.group, slab.row = self, len(self.slabs)
        self.slabs.append(slab)
        for layer in self.layers:
            # What attention masks out must be numbers: 0 times NaN is NaN.
            layer[:, slab.row] = 0

    def remove(self, row: int) -> None:
        """Take the slab of a row out; the last one moves there."""
        last = self.slabs.pop()
        if row < len(self.slabs):
            for layer in self.layers:
                layer[:, row] = layer[:, last.row]
            last.row = row
            self.slabs[row] = last


class SlabPool:
    """All slabs of an engine."""

    def __init__(self, shape: SlabShape) -> None:
        self._shape = shape
        self._groups: dict[int, list[SlabGroup]] = {}  # by capacity
        self._made = 0  # groups, ever

    def place(self, slab: "Slab", capacity: int) -> None:
        """Put a slab into a group of a capacity."""
        groups = self._groups.setdefault(capacity, [])
        group = next((each for each in groups if not each.full), None)
        if group is None:
            group = SlabGroup(self._shape, capacity, self._made)
            self._made += 1
            groups.append(group)
        group.add(slab)

    def remove(self, group: SlabGroup, row: int) -> None:
        """Take a row's slab out of its group; memory that nobody uses goes."""
        group.remove(row)
        if not group.slabs:
            self._groups[group.capacity].remove(group)

    def check(self, slabs: Iterable["Slab"]) -> None:
        """Assert that these slabs, and no others, have memory, each its own."""
        groups = list(chain.from_iterable(self._groups.values()))
        placed = [slab for group in groups for slab in group.slabs]
        assert {*placed} == {slab for slab in slabs if slab.capacity}, "a slab that nobody uses"
        for group in groups:
            for row, slab in enumerate(group.slabs):
                assert (slab.group, slab.row) == (group, row), "two slabs in one place"


class Slab(Lane):
    """Room for one sequence's keys and values, contiguous in each layer and head."""

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self.group: SlabGroup | None = None  # None while it is empty
        self.row = 0  # in its group; may change between two steps

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return 0 if self.group is None else self.group.capacity

    def layer(self, index: int) -> Tensor:
        """One layer's keys, then values: a view of (2, kv_heads, capacity, head_dim)."""
        assert self.group is not None, "nothing was reserved"
        return self.group.layers[index][:, self.row]

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens; what is stored stays."""
        if tokens <= self.capacity:
            return
        old, row = self.group, self.row
        self._pool.place(self, _capacity_for(tokens))
        if old is not None and self.group is not None:
            for new_layer, old_layer in zip(self.group.layers, old.layers, strict=True):
                new_layer[:, self.row, :, : old.capacity] = old_layer[:, row]
            self._pool.remove(old, row)

    def free(self) -> None:
        """Give the memory back."""
        if self.group is not None:
            self._pool.remove(self.group, self.row)
            self.group = None

    def read(self, start: int, end: int) -> list[Tensor]:
        """A copy of what is stored of some tokens: each layer's (2, kv_heads, tokens, head_dim)."""
        assert self.group is not None, "nothing was reserved"
        return [layer[:, self.row, :, start:end].clone() for layer in self.group.layers]

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store what `read` gave, from a token on."""
        end = start + values[0].shape[2]
        self.reserve(end)
        for index, value in enumerate(values):
            self.layer(index)[:, :, start:end] = value


def _capacity_for(tokens: int) -> int:
    """64, 96, 128, 192, 256, ...: few sizes, so that many slabs have the same."""
    size = _SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size.bit_count() == 1 else size * 4 // 3
    return size
