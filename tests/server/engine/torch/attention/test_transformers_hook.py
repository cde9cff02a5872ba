"""Tests the attention that transformers' layers call, over slabs, against a simple reference."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from server.engine.torch.attention.backend import LaneSpan
from server.engine.torch.attention.slab import KVShape, Slab, SlabPool
from server.engine.torch.attention.slab_attention import SlabMemory, SlabStep
from server.engine.torch.attention.transformers_hook import (
    UnsupportedAttentionError,
    engine_attention,
)

HEADS, KV_HEADS, WIDTH = 6, 2, 8
SHAPE = KVShape(KV_HEADS, WIDTH, torch.float32, (torch.device("cpu"),) * 2)
LAYER = SimpleNamespace(layer_idx=1)


def slab_of(tokens: int, pool: SlabPool) -> Slab:
    slab = Slab(pool)
    slab.reserve(tokens)
    return slab


def reference(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """Return causal attention, (heads, n, width), for one whole sequence, query by query.

    The query is (HEADS, n, width). The key and value are (KV_HEADS, n, width), each shared by
    HEADS / KV_HEADS query heads. Scores are scaled by 0.5.
    """
    output = torch.zeros_like(query)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        for place in range(query.shape[1]):
            first = 0 if window is None else max(0, place - window + 1)
            scores = key[shared, first : place + 1] @ query[head, place] * 0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[head, place] = scores.softmax(-1) @ value[shared, first : place + 1]
    return output


@pytest.mark.parametrize("as_operator", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("chunks", [(11,), (1, 10), (4, 1, 6), (7, 2, 2), (1,) * 11], ids=str)
def test_sequences_of_unequal_lengths_in_chunks_equal_the_reference(
    window: int | None,
    chunks: tuple[int, ...],
    softcap: float | None,
    as_operator: bool,
) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = (11, 5, 11, 11, 7)
    sequences = [
        [
            torch.randn(heads, length, WIDTH, generator=random)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        for length in lengths
    ]
    pool = SlabPool(SHAPE)
    slabs = [slab_of(length, pool) for length in lengths]
    done = [0] * len(lengths)
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    for chunk in chunks:
        packed = []
        for owner, length in enumerate(lengths):
            count = min(chunk, length - done[owner])
            if count:
                place = slice(done[owner], done[owner] + count)
                segment = LaneSpan(slabs[owner], done[owner], count)
                packed.append((segment, owner, [part[:, place] for part in sequences[owner]]))
                done[owner] += count
        packed.sort(key=lambda item: SlabMemory(SHAPE).order(item[0]))
        segments, owners = [item[0] for item in packed], [item[1] for item in packed]
        query, key, value = (
            torch.cat(parts, dim=1)[None]
            for parts in zip(*(item[2] for item in packed), strict=True)
        )
        with SlabStep(segments).activate():
            output, weights = engine_attention(
                LAYER,
                query,
                key,
                value,
                None,
                scaling=0.5,
                sliding_window=window,
                softcap=softcap,
                layer_index=torch.tensor(1) if as_operator else None,
            )
        assert weights is None
        parts = torch.split(output[0], [segment.count for segment in segments])
        for owner, piece in zip(owners, parts, strict=True):
            outputs[owner].append(piece)
    for (query, key, value), pieces in zip(sequences, outputs, strict=True):
        expected = reference(query, key, value, window, softcap).transpose(0, 1)
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"s_aux": torch.ones(1)}, "s_aux"),
        ({"is_causal": False}, "is_causal=False"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_would_change_the_result_is_refused(asked: dict[str, object], named: str) -> None:
    token = torch.ones(1, KV_HEADS, 1, WIDTH)
    step = SlabStep([LaneSpan(slab_of(1, SlabPool(SHAPE)), 0, 1)])
    with step.activate(), pytest.raises(UnsupportedAttentionError, match=named):
        engine_attention(LAYER, token, token, token, None, **asked)  # type: ignore[arg-type]
