"""The keys and values of one sequence: a slab a layer, on the layer's device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.devices import layer_devices

# Tokens by which a slab grows: the copy is then a small part of what attention reads meanwhile.
_GROWTH = 64


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


class Slab:
    """Room for one sequence's keys and values, contiguous in each layer."""

    def __init__(self, shape: SlabShape) -> None:
        self._shape = shape
        self.layers = [self._empty(device, 0) for device in shape.devices]

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return self.layers[0].shape[2]

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens; what is stored stays."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // _GROWTH) * _GROWTH
        for index, old in enumerate(self.layers):
            new = self._empty(old.device, capacity)
            new[:, :, : old.shape[2]] = old
            self.layers[index] = new

    def read(self, start: int, end: int) -> list[Tensor]:
        """A copy of what is stored of some tokens: a layer's (2, kv_heads, end - start, head_dim)."""
        return [layer[:, :, start:end].clone() for layer in self.layers]

    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store what `read` gave, from a token on."""
        end = start + values[0].shape[2]
        self.reserve(end)
        for layer, value in zip(self.layers, values, strict=True):
            layer[:, :, start:end] = value

    def _empty(self, device: torch.device, capacity: int) -> Tensor:
        """(2, kv_heads, capacity, head_dim): keys, then values."""
        shape = self._shape
        size = (2, shape.kv_heads, capacity, shape.head_dim)
        return torch.empty(size, dtype=shape.dtype, device=device)
