"""Keeps keys and values in slabs: one slab a sequence, slabs of one capacity side by side.

Because they lie side by side, one attention call serves many decoding sequences, each with its own
slab. A slab has room for more tokens than it stores; on a CPU, unused room takes no physical
memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.attention.backend import Lane
from server.engine.torch.attention.mapped import TensorPool
from server.engine.torch.attention.slab_rows import MappedRows, PlainRows
from server.engine.torch.model.devices import layer_devices

_SMALLEST: Final = 64  # the least capacity of a slab, in tokens
_GROUP_TOKENS: Final = 8192  # tokens that a group has room for; a larger slab is alone in its group
# A slab is moved in parts, and only one part is in memory twice at a time. A part is as large as
# 1/_PARTS of the slab's tokens in all layers, or as _PART_TOKENS tokens in all layers if that is
# more: a short slab moves faster a whole layer at a time.
_PARTS: Final = 128
_PART_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape and dtype of a token's keys and values, and the device of each layer."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: Sequence[torch.device]  # each layer's, in order

    @classmethod
    def of(cls, model: PreTrainedModel) -> "KVShape":
        """Read the shape from a model's configuration, the devices from its modules."""
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
        """The bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token's keys and values in all layers."""
        return len(self.devices) * self.bytes_per_token_and_layer

    @property
    def head_bytes(self) -> int:
        """The bytes of one token's keys (or values) of one head in one layer."""
        return self.head_dim * self.dtype.itemsize


class SlabGroup:
    """Holds slabs of one capacity, in the first rows of `layers` without a gap."""

    def __init__(self, shape: KVShape, capacity: int, number: int) -> None:
        """Raises OSError or torch.OutOfMemoryError if there is no memory."""
        self.capacity = capacity
        self.number = number  # counts groups in the order in which they were made
        self.slabs: list[Slab] = []  # by row
        self._max_slabs = max(1, _GROUP_TOKENS // capacity)
        size = (2, self._max_slabs, shape.kv_heads, capacity, shape.head_dim)
        self._rows: list[MappedRows | PlainRows] = [
            MappedRows(size, shape.dtype)
            if device.type == "cpu"
            else PlainRows(size, shape.dtype, device)
            for device in shape.devices
        ]
        # A layer's keys, then its values: (2, rows, kv_heads, capacity, head_dim).
        self.layers = [rows.tensor for rows in self._rows]

    @property
    def full(self) -> bool:
        """True if every row is taken."""
        return len(self.slabs) == self._max_slabs

    def add(self, slab: "Slab") -> None:
        """Give a slab the next row, which holds zeros."""
        slab.group, slab.row = self, len(self.slabs)
        self.slabs.append(slab)

    def remove(self, row: int, tokens: int) -> None:
        """Remove the slab in a row, with `tokens` tokens stored there; the last takes its row."""
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
        """Move a row's tokens to a row of `target`, and leave zeros behind.

        Parts are moved one after another, from the end on, so that little is in memory twice.
        """
        count = self.move_size(tokens)
        for old, new in zip(self._rows, target._rows, strict=True):
            for start in reversed(range(0, tokens, count)):
                part = slice(start, min(start + count, tokens))
                new.tensor[:, target_row, :, part] = old.tensor[:, row, :, part]
                old.clear(row, start)

    def move_size(self, tokens: int) -> int:
        """Return how many tokens of one layer are moved at once, of a slab of `tokens` tokens."""
        granule = max(rows.granule for rows in self._rows)
        wanted = len(self._rows) * max(_PART_TOKENS, -(-tokens // _PARTS))
        return -(-wanted // granule) * granule

    def clear(self, row: int, start: int) -> None:
        """Zero a row's tokens from `start` on, in all layers, and give their memory back."""
        for rows in self._rows:
            rows.clear(row, start)


class SlabPool:
    """Holds all slabs of an engine, and allocates copies of their tokens."""

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._groups: dict[int, list[SlabGroup]] = {}  # by capacity
        self._groups_made = 0  # so far
        self._copies: dict[int, TensorPool] = {}  # by number of tokens

    def copy_of(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Copy some tokens of a slab, given and returned as one tensor a layer.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory.
        """
        if any(device.type != "cpu" for device in self.shape.devices):
            return [layer.clone() for layer in layers]
        size = (len(layers), *layers[0].shape)
        if size[3] not in self._copies:
            self._copies[size[3]] = TensorPool(size, self.shape.dtype)
        copies = self._copies[size[3]].take()
        for copied, layer in zip(copies, layers, strict=True):
            copied.copy_(layer)
        return list(copies)

    def add(self, slab: "Slab", capacity: int) -> None:
        """Put a slab into a group of slabs of `capacity` tokens."""
        groups = self._groups.setdefault(capacity, [])
        group = next((each for each in groups if not each.full), None)
        if group is None:
            group = SlabGroup(self.shape, capacity, self._groups_made)
            self._groups_made += 1
            groups.append(group)
        group.add(slab)

    def remove(self, group: SlabGroup, row: int, tokens: int) -> None:
        """Remove the slab in a group's row, with `tokens` tokens stored there."""
        group.remove(row, tokens)
        if not group.slabs:
            self._groups[group.capacity].remove(group)

    def check(self, slabs: Iterable["Slab"]) -> None:
        """Assert that exactly these slabs have memory, and that none share any."""
        groups = self._all_groups()
        placed = [slab for group in groups for slab in group.slabs]
        assert {*placed} == {slab for slab in slabs if slab.capacity}, "a slab that nobody uses"
        for group in groups:
            for row, slab in enumerate(group.slabs):
                assert (slab.group, slab.row) == (group, row), "two slabs in one place"

    def _all_groups(self) -> list[SlabGroup]:
        return list(chain.from_iterable(self._groups.values()))


class Slab(Lane):
    """Holds one sequence's keys and values, contiguous in each layer and head."""

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self.group: SlabGroup | None = None  # None before anything is reserved
        self.tokens = 0  # tokens that may have been written; beyond them are zeros
        self.row = 0  # its row in the group; may change between two steps

    @property
    def capacity(self) -> int:
        """The number of tokens that the slab has room for."""
        return 0 if self.group is None else self.group.capacity

    def layer(self, index: int) -> Tensor:
        """Return a view of one layer's keys, then values: (2, kv_heads, capacity, head_dim)."""
        assert self.group is not None, "nothing was reserved"
        return self.group.layers[index][:, self.row]

    def reserve(self, tokens: int) -> None:
        """Make room for at least `tokens` tokens; stored tokens are kept.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory; the slab is unchanged.
        """
        if tokens > self.capacity:
            old, row = self.group, self.row
            self._pool.add(self, _capacity_for(tokens))
            if old is not None and self.group is not None:
                old.move(row, self.group, self.row, self.tokens)
                self._pool.remove(old, row, 0)
        self.tokens = max(self.tokens, tokens)

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens, and give the memory of the others back."""
        if self.group is not None and tokens < self.tokens:
            self.group.clear(self.row, tokens)
            self.tokens = tokens

    def free(self) -> None:
        """Give all memory back."""
        if self.group is not None:
            group, self.group = self.group, None
            tokens, self.tokens = self.tokens, 0
            self._pool.remove(group, self.row, tokens)

    def read(self, start: int, end: int) -> list[Tensor]:
        """Copy tokens `start` to `end`: (2, kv_heads, tokens, head_dim) for each layer."""
        assert self.group is not None, "nothing was reserved"
        return self._pool.copy_of([layer[:, self.row, :, start:end] for layer in self.group.layers])

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store the tensors that `read` returned, as the tokens from `start` on."""
        end = start + values[0].shape[2]
        self.reserve(end)
        for index, value in enumerate(values):
            self.layer(index)[:, :, start:end] = value


def _capacity_for(tokens: int) -> int:
    """Round up to 64, 96, 128, 192, 256, ...: few sizes, so that many slabs share one."""
    size = _SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size.bit_count() == 1 else size * 4 // 3
    return size
