"""One step's attention on a CPU: each sequence attends to its own slab of keys and values.

Tokens of all sequences come packed in one row, and a sequence's result does not depend on what
else is in the batch. Those that decode and have neighbouring slabs do so in one call.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.engine.torch.attention.backend import (
    AttentionParams,
    AttentionStep,
    KVMemory,
    Lane,
    LaneSpan,
)
from server.engine.torch.attention.slab import Slab, SlabGroup, SlabPool, SlabShape
from server.engine.torch.attention.soft_cap import soft_capped_attention


@dataclass(frozen=True, slots=True)
class SlabSpan:
    """Consecutive tokens of one sequence in a step."""

    slab: Slab
    start: int  # tokens that the slab holds already
    count: int

    @property
    def end(self) -> int:
        """Tokens that the slab holds afterwards."""
        return self.start + self.count


class SlabStep(AttentionStep):
    """One step over slabs."""

    def __init__(self, spans: Sequence[SlabSpan]) -> None:
        """Segments that decode should come in the order of `decoding_order`."""
        super().__init__()
        self._parts = _parts(spans)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """As every step's; see `AttentionStep.attend`."""
        self.windows.add(params.window)
        new = torch.stack((key[0], value[0]))  # (2, kv_heads, tokens, head_dim)
        outputs = [
            part.attend(layer, query[0, :, part.tokens], new[:, :, part.tokens], params)
            for part in self._parts
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


class SlabMemory(KVMemory):
    """Slabs, made as they are wanted."""

    fixed = False
    probe_lanes = 18

    def __init__(self, shape: SlabShape) -> None:
        self._pool = SlabPool(shape)

    @property
    def bytes(self) -> int:
        """Memory that slabs and copies of what they store take, on a CPU."""
        return self._pool.bytes

    def lane(self) -> Slab:
        """A slab without room yet."""
        return Slab(self._pool)

    def order(self, span: LaneSpan) -> tuple[bool, int, int]:
        """Those that decode first, neighbours together."""
        return decoding_order(_slab_span(span))

    def step(self, spans: Sequence[LaneSpan]) -> SlabStep:
        """The attention of a step; `spans` should come in the order of `order`."""
        return SlabStep([_slab_span(span) for span in spans])

    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that these slabs, and no others, have memory, each its own."""
        self._pool.check(_slab(lane) for lane in lanes)


def _slab(lane: Lane) -> Slab:
    assert isinstance(lane, Slab), "a lane of another memory"
    return lane


def _slab_span(span: LaneSpan) -> SlabSpan:
    return SlabSpan(_slab(span.lane), span.start, span.count)


def decoding_order(span: SlabSpan) -> tuple[bool, int, int]:
    """A sort key: those that decode first, neighbours together."""
    if span.count > 1 or span.slab.group is None:
        return True, 0, 0
    return False, span.slab.group.number, span.slab.row


class _Decode:
    """One token each of sequences whose slabs are neighbours."""

    def __init__(self, first: int, spans: Sequence[SlabSpan]) -> None:
        self.tokens = slice(first, first + len(spans))
        group = spans[0].slab.group
        assert group is not None, "nothing was reserved"
        self._group: SlabGroup = group
        row = spans[0].slab.row
        self._rows = slice(row, row + len(spans))
        self._places = [span.start for span in spans]
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}

    def attend(self, layer: int, query: Tensor, new: Tensor, params: AttentionParams) -> Tensor:
        """(heads, n, head_dim), (2, kv_heads, n, head_dim) -> (n, heads, head_dim)."""
        stored = self._group.layers[layer][:, self._rows]  # (2, n, kv_heads, capacity, head_dim)
        if len(self._places) == 1:  # an index of tensors costs more than what it moves
            stored[:, :, :, self._places[0]] = new.transpose(1, 2)
        else:
            rows, places = self._index(stored.device)
            stored[:, rows, :, places] = new.permute(2, 0, 1, 3)
        first = _first_key(min(self._places), params.window)
        keys, values = stored[:, :, :, first : max(self._places) + 1]
        heads, count, head_dim = query.shape
        # The query heads that share a KV head are folded into the query dimension, so that K and
        # V are read once and not repeated.
        folded = query.transpose(0, 1).reshape(count, keys.shape[1], -1, head_dim)
        mask = self._mask(params.window, query.dtype, query.device)
        output = _attention(folded, keys, values, mask, params)
        return output.reshape(count, heads, head_dim)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of each sequence: its row among these, and the place of its token; (n,) int64."""
        if device not in self._indices:
            places = torch.tensor(self._places, device=device)
            self._indices[device] = torch.arange(len(places), device=device), places
        return self._indices[device]

    def _mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(n, 1, 1, keys): 0 where a key is seen, else -inf; None where all see all."""
        if len(set(self._places)) == 1:
            return None
        key = (window, dtype, device)
        if key not in self._masks:
            _, places = self._index(device)
            first = _first_key(min(self._places), window)
            keys = torch.arange(first, max(self._places) + 1, device=device)
            self._masks[key] = _additive(_seen(places, keys, window), dtype)[:, None, None]
        return self._masks[key]


class _Prefill:
    """Several tokens of one sequence."""

    def __init__(self, first: int, span: SlabSpan) -> None:
        self.tokens = slice(first, first + span.count)
        self._span = span
        self._masks: dict[tuple[int | None, int, torch.dtype, torch.device], Tensor] = {}

    def attend(self, layer: int, query: Tensor, new: Tensor, params: AttentionParams) -> Tensor:
        """(heads, n, head_dim), (2, kv_heads, n, head_dim) -> (n, heads, head_dim)."""
        span = self._span
        stored = span.slab.layer(layer)
        stored[:, :, span.start : span.end] = new
        keys, values = stored[:, None, :, _first_key(span.start, params.window) : span.end]
        heads, count, head_dim = query.shape
        fold = heads // keys.shape[1]
        folded = query.reshape(1, keys.shape[1], fold * count, head_dim)
        mask = self._mask(params.window, fold, query.dtype, query.device)
        output = _attention(folded, keys, values, mask, params)
        return output.reshape(heads, count, head_dim).transpose(0, 1)

    def _mask(
        self, window: int | None, fold: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """(fold * n, keys): 0 where a key is seen, else -inf."""
        key = (window, fold, dtype, device)
        if key not in self._masks:
            span = self._span
            queries = torch.arange(span.start, span.end, device=device)
            keys = torch.arange(_first_key(span.start, window), span.end, device=device)
            self._masks[key] = _additive(_seen(queries, keys, window), dtype).repeat(fold, 1)
        return self._masks[key]


_Part: TypeAlias = _Decode | _Prefill


def _parts(spans: Sequence[SlabSpan]) -> list[_Part]:
    """Segments, one after the other, as parts that one call attends for."""
    parts: list[_Part] = []
    first = 0
    # Within a run of neighbours, the row and the place in the step grow alike.
    runs = groupby(enumerate(spans), key=lambda item: _run(*item))
    for _, items in runs:
        run = [span for _, span in items]
        if run[0].count == 1:
            parts.append(_Decode(first, run))
        else:
            parts.append(_Prefill(first, run[0]))
        first += sum(span.count for span in run)
    return parts


def _run(index: int, span: SlabSpan) -> tuple[object, int]:
    if span.count == 1:
        return span.slab.group, span.slab.row - index
    return span, 0


def _first_key(place: int, window: int | None) -> int:
    """The first key that the query at a place sees."""
    return 0 if window is None else max(0, place + 1 - window)


def _seen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, by their places: (n,), (keys,) int64 -> (n, keys) bool."""
    seen = keys <= queries[:, None]
    if window is not None:
        seen &= keys > queries[:, None] - window
    return seen


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, -torch.inf)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
) -> Tensor:
    """(n, kv_heads, queries, head_dim) of `query`; K and V (n, kv_heads, keys, head_dim)."""
    if params.softcap is not None:
        return soft_capped_attention(query, key, value, mask, params.scaling, params.softcap)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=params.scaling)
