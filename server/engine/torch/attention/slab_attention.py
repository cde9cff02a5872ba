"""Computes a step's attention over slabs: each sequence attends to its own keys and values.

Tokens of all sequences come packed in one row, and a sequence's result does not depend on what
else is in the batch. One call attends for all decoding sequences whose slabs are neighbours.
"""

from collections.abc import Iterable, Sequence
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
from server.engine.torch.attention.slab import KVShape, Slab, SlabGroup, SlabPool
from server.engine.torch.attention.soft_cap import soft_capped_attention


class SlabStep(AttentionStep):
    """Attends for one step over slabs."""

    def __init__(self, spans: Sequence[LaneSpan]) -> None:
        """Decoding spans should be in the order of `SlabMemory.order`, so that they share calls."""
        super().__init__()
        self._parts = _parts(spans)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the step's keys and values, then attend; see `AttentionStep.attend`."""
        self.windows.add(params.window)
        new = torch.stack((key[0], value[0]))  # (2, kv_heads, tokens, head_dim)
        outputs = [
            part.attend(layer, query[0, :, part.tokens], new[:, :, part.tokens], params)
            for part in self._parts
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


class SlabMemory(KVMemory):
    """Makes slabs as sequences need them."""

    is_preallocated = False
    probe_lanes = 18

    def __init__(self, shape: KVShape) -> None:
        self._pool = SlabPool(shape)

    def lane(self) -> Slab:
        """Make a slab that has no room yet."""
        return Slab(self._pool)

    def order(self, span: LaneSpan) -> tuple[bool, int, int]:
        """Return a sort key that puts decoding sequences first, neighbouring slabs together."""
        slab = _slab(span.lane)
        if span.count > 1 or slab.group is None:
            return True, 0, 0
        return False, slab.group.number, slab.row

    def step(self, spans: Sequence[LaneSpan]) -> SlabStep:
        """Make the attention of a step; `spans` should be in the order of `order`."""
        return SlabStep(spans)

    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that exactly these slabs have memory, and that none share any."""
        self._pool.check(_slab(lane) for lane in lanes)


def _slab(lane: Lane) -> Slab:
    assert isinstance(lane, Slab), "a lane of another memory"
    return lane


class _Decode:
    """Attends for one token of each of some sequences, whose slabs are neighbours."""

    def __init__(self, first: int, spans: Sequence[LaneSpan]) -> None:
        self.tokens = slice(first, first + len(spans))
        slab = _slab(spans[0].lane)
        assert slab.group is not None, "nothing was reserved"
        self._group: SlabGroup = slab.group
        self._rows = slice(slab.row, slab.row + len(spans))
        self._places = [span.start for span in spans]
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}

    def attend(self, layer: int, query: Tensor, new: Tensor, params: AttentionParams) -> Tensor:
        """Store K and V, then attend.

        (heads, n, head_dim), (2, kv_heads, n, head_dim) -> (n, heads, head_dim).
        """
        stored = self._group.layers[layer][:, self._rows]  # (2, n, kv_heads, capacity, head_dim)
        if len(self._places) == 1:  # indexing by tensors costs more than copying one token
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
        """Return each sequence's row in `_rows`, and its new token's place: (n,) int64 both."""
        if device not in self._indices:
            places = torch.tensor(self._places, device=device)
            self._indices[device] = torch.arange(len(places), device=device), places
        return self._indices[device]

    def _mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return (n, 1, 1, keys): 0 where a key is seen, else -inf; None where all keys are."""
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
    """Attends for several tokens of one sequence."""

    def __init__(self, first: int, span: LaneSpan) -> None:
        self.tokens = slice(first, first + span.count)
        self._span = span
        self._slab = _slab(span.lane)
        self._masks: dict[tuple[int | None, int, torch.dtype, torch.device], Tensor] = {}

    def attend(self, layer: int, query: Tensor, new: Tensor, params: AttentionParams) -> Tensor:
        """Store K and V, then attend.

        (heads, n, head_dim), (2, kv_heads, n, head_dim) -> (n, heads, head_dim).
        """
        span = self._span
        stored = self._slab.layer(layer)
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
        """Return (fold * n, keys): 0 where a key is seen, else -inf."""
        key = (window, fold, dtype, device)
        if key not in self._masks:
            span = self._span
            queries = torch.arange(span.start, span.end, device=device)
            keys = torch.arange(_first_key(span.start, window), span.end, device=device)
            self._masks[key] = _additive(_seen(queries, keys, window), dtype).repeat(fold, 1)
        return self._masks[key]


_Part: TypeAlias = _Decode | _Prefill


def _parts(spans: Sequence[LaneSpan]) -> list[_Part]:
    """Divide spans, in order, into parts each of which one call attends for."""
    parts: list[_Part] = []
    first = 0
    # In a run of neighbouring slabs, rows grow by 1 from span to span, as indices do.
    runs = groupby(enumerate(spans), key=lambda item: _run(*item))
    for _, items in runs:
        run = [span for _, span in items]
        if run[0].count == 1:
            parts.append(_Decode(first, run))
        else:
            parts.append(_Prefill(first, run[0]))
        first += sum(span.count for span in run)
    return parts


def _run(index: int, span: LaneSpan) -> tuple[object, int]:
    if span.count == 1:
        slab = _slab(span.lane)
        return slab.group, slab.row - index
    return span, 0


def _first_key(place: int, window: int | None) -> int:
    """Return the place of the first key that the query at `place` sees."""
    return 0 if window is None else max(0, place + 1 - window)


def _seen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which keys each query sees, by their places: (n,), (keys,) -> (n, keys) bool."""
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
    """Attend: (n, kv_heads, queries, head_dim), with K and V (n, kv_heads, keys, head_dim)."""
    if params.softcap is not None:
        return soft_capped_attention(query, key, value, mask, params.scaling, params.softcap)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=params.scaling)
