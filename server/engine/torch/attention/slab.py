"""Memory for keys and values on a CPU: one slab a sequence, slabs of one size side by side.

Side by side, so that one call attends for all sequences that decode, each to its own slab. A slab
has room for more tokens than it stores; that room takes memory when it is stored in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.attention.backend import Lane
from server.engine.torch.attention.mapped import KeptCopies, whole_pages
from server.engine.torch.attention.slab_rows import make_rows
from server.engine.torch.model.devices import layer_devices

_SMALLEST: Final = 64  # tokens
_GROUP_TOKENS: Final = 8192  # that a group has room for, or one slab
# While a slab is moved, one part of it is there twice: one of so many parts of its tokens in all
# layers, or so many tokens in all layers, as a short slab moves faster a layer at a time.
_PARTS: Final = 128
_PART_TOKENS: Final = 8


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

    @property
    def head_bytes(self) -> int:
        """Memory of one token's keys, or values, for one head in one layer."""
        return self.head_dim * self.dtype.itemsize

    def bytes_of(self, tokens: int) -> int:
        """Memory that a slab takes which stores so many tokens, on a CPU."""
        return 2 * len(self.devices) * self.kv_heads * whole_pages(tokens * self.head_bytes)


class SlabGroup:
    """Slabs of one capacity: the first rows of `layers`, without a gap."""

    def __init__(self, shape: SlabShape, capacity: int, number: int) -> None:
        """Raises OSError or torch.OutOfMemoryError if there is no memory."""
        self.capacity = capacity
        self.number = number  # in the order in which groups were made
        self.slabs: list[Slab] = []  # by row
        self._most = max(1, _GROUP_TOKENS // capacity)
        self._rows = [
            make_rows(self._most, shape.kv_heads, capacity, shape.head_dim, shape.dtype, device)
            for device in shape.devices
        ]
        # A layer's keys, then its values: (2, rows, kv_heads, capacity, head_dim).
        self.layers = [rows.tensor for rows in self._rows]

    @property
    def full(self) -> bool:
        """Whether every row is taken."""
        return len(self.slabs) == self._most

    def add(self, slab: "Slab") -> None:
        """Give a slab the next row, which holds zeros."""
        slab.group, slab.row = self, len(self.slabs)
        self.slabs.append(slab)

    def remove(self, row: int, tokens: int) -> None:
        """Take the slab of a row out, which stored so many tokens; the last one moves there."""
        if tokens:
            self.clear(row, 0)
        last = len(self.slabs) - 1
        if row != last:
            slab = self.slabs[last]
            self.move(last, self, row, slab.tokens)
            slab.row = row
            self.slabs[row] = slab
        self.slabs.pop()

    def move(self, row: int, target: "SlabGroup", target_row: int, tokens: int) -> None:
        """Bring what a row stores to another, and leave zeros there.

        A little after the other, from the end on, so that there is never much of it twice.
        """
        count = self.part_of(tokens)
        for old, new in zip(self._rows, target._rows, strict=True):
            for start in reversed(range(0, tokens, count)):
                part = slice(start, min(start + count, tokens))
                new.tensor[:, target_row, :, part] = old.tensor[:, row, :, part]
                old.clear(row, start)

    def part_of(self, tokens: int) -> int:
        """How many of a slab's tokens are moved at once, in one layer."""
        granule = max(rows.granule for rows in self._rows)
        wanted = len(self._rows) * max(_PART_TOKENS, -(-tokens // _PARTS))
        return -(-wanted // granule) * granule

    def clear(self, row: int, start: int) -> None:
        """Make zeros of a row's tokens from one on, in all layers, and give their memory back."""
        for rows in self._rows:
            rows.clear(row, start)


class SlabPool:
    """All slabs of an engine."""

    def __init__(self, shape: SlabShape) -> None:
        self.shape = shape
        self._groups: dict[int, list[SlabGroup]] = {}  # by capacity
        self._made = 0  # groups, ever
        self._copies: dict[int, KeptCopies] = {}  # by tokens

    @property
    def bytes(self) -> int:
        """Memory that slabs and copies of what they store take, on a CPU."""
        # While a slab grows, it is in two groups.
        slabs = {*chain.from_iterable(group.slabs for group in self._all_groups())}
        stored = sum(self.shape.bytes_of(slab.tokens) for slab in slabs)
        return stored + sum(copies.bytes for copies in self._copies.values())

    def copy_of(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Copies of some tokens of a slab, a layer each.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory.
        """
        if any(device.type != "cpu" for device in self.shape.devices):
            return [layer.clone() for layer in layers]
        size = (len(layers), *layers[0].shape)
        if size[3] not in self._copies:
            self._copies[size[3]] = KeptCopies(size, self.shape.dtype)
        copies = self._copies[size[3]].take()
        for copied, layer in zip(copies, layers, strict=True):
            copied.copy_(layer)
        return list(copies)

    def place(self, slab: "Slab", capacity: int) -> None:
        """Put a slab into a group of a capacity."""
        groups = self._groups.setdefault(capacity, [])
        group = next((each for each in groups if not each.full), None)
        if group is None:
            group = SlabGroup(self.shape, capacity, self._made)
            self._made += 1
            groups.append(group)
        group.add(slab)

    def remove(self, group: SlabGroup, row: int, tokens: int) -> None:
        """Take a row's slab out of its group, which stored so many tokens there."""
        group.remove(row, tokens)
        if not group.slabs:
            self._groups[group.capacity].remove(group)

    def check(self, slabs: Iterable["Slab"]) -> None:
        """Assert that these slabs, and no others, have memory, each its own."""
        groups = self._all_groups()
        placed = [slab for group in groups for slab in group.slabs]
        assert {*placed} == {slab for slab in slabs if slab.capacity}, "a slab that nobody uses"
        for group in groups:
            for row, slab in enumerate(group.slabs):
                assert (slab.group, slab.row) == (group, row), "two slabs in one place"

    def _all_groups(self) -> list[SlabGroup]:
        return list(chain.from_iterable(self._groups.values()))


class Slab(Lane):
    """Room for one sequence's keys and values, contiguous in each layer and head."""

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self.group: SlabGroup | None = None  # None while it is empty
        self.tokens = 0  # that it may store something of; beyond them are zeros
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
        """Have room for so many tokens; what is stored stays.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory; the slab is what it was.
        """
        if tokens > self.capacity:
            old, row = self.group, self.row
            self._pool.place(self, _capacity_for(tokens))
            if old is not None and self.group is not None:
                old.move(row, self.group, self.row, self.tokens)
                self._pool.remove(old, row, 0)
        self.tokens = max(self.tokens, tokens)

    def truncate(self, tokens: int) -> None:
        """Forget what is stored from a token on, and give its memory back."""
        if self.group is not None and tokens < self.tokens:
            self.group.clear(self.row, tokens)
            self.tokens = tokens

    def free(self) -> None:
        """Give the memory back."""
        if self.group is not None:
            group, self.group = self.group, None
            tokens, self.tokens = self.tokens, 0
            self._pool.remove(group, self.row, tokens)

    def read(self, start: int, end: int) -> list[Tensor]:
        """A copy of what is stored of some tokens: each layer's (2, kv_heads, tokens, head_dim)."""
        assert self.group is not None, "nothing was reserved"
        return self._pool.copy_of([layer[:, self.row, :, start:end] for layer in self.group.layers])

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
