"""What torch's `varlen_attn` computes, slowly and on any device, and engines that run on it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch import build
from server.engine.torch.kv_plan import KVPlan, KVWishes, plan_pages
from server.engine.torch.slab import SlabShape
from server.engine.torch.varlen import VarlenFunction, available_forms


def paged_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """As torch 2.13 has it, with what FlashAttention 2 insists on."""
    assert cu_seq_k is not None, "FlashAttention 2 wants both"
    for each in (cu_seq_q, cu_seq_k, *(t for t in (seqused_k, block_table) if t is not None)):
        assert each.dtype == torch.int32
        assert each.device == query.device
    assert num_splits == 1, "rows are left unwritten where it chooses by itself"
    assert enable_gqa or query.shape[1] == key.shape[-2]
    lengths = (
        [end - start for start, end in pairwise(cu_seq_k.tolist())]
        if seqused_k is None
        else seqused_k.tolist()
    )
    assert max_k >= max(lengths)
    output = torch.full_like(query, torch.nan)
    for place, (first, last) in enumerate(pairwise(cu_seq_q.tolist())):
        assert last - first <= max_q
        if block_table is None:
            start = int(cu_seq_k[place])
            keys, values = (each[start : start + lengths[place]] for each in (key, value))
        else:
            assert key.shape[1] % 256 == 0, "FlashAttention 2 takes no other pages"
            pages = block_table[place, : -(-lengths[place] // key.shape[1])].long()
            keys, values = (each[pages].flatten(0, 1)[: lengths[place]] for each in (key, value))
        output[first:last] = _attend(query[first:last], keys, values, scale, window_size)
    return output


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """As it was before it knew of pages."""
    return paged_varlen(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window_size,
        enable_gqa=True,
        num_splits=1,
    )


def causal_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """As it was before it knew of windows."""
    window = (-1, 0 if is_causal else -1)
    return plain_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window_size: tuple[int, int]
) -> Tensor:
    """One sequence; its last query stands at its last key."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1).float(), value.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key)
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    places = torch.arange(len(key) - len(query), len(key), device=query.device)[:, None]
    before, after = window_size
    keys = torch.arange(len(key), device=query.device)
    seen = torch.ones_like(scores[0], dtype=torch.bool)
    if before >= 0:
        seen &= keys >= places - before
    if after >= 0:
        seen &= keys <= places + after
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


class EagerCapture:
    """In place of CUDA graphs: what was captured is computed again."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(
        self, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        self.captured += 1
        results = [tensor.clone() for tensor in function()]

        def replay() -> None:
            self.replayed += 1
            for result, new in zip(results, function(), strict=True):
                result.copy_(new)

        return replay, results


def use_pages(monkeypatch: pytest.MonkeyPatch, function: VarlenFunction) -> EagerCapture:
    """Have engines on this machine use pages, attended to by a function, and graphs."""
    capture = EagerCapture()

    def plan(model: PreTrainedModel, wishes: KVWishes) -> KVPlan:
        return plan_pages(model, SlabShape.of(model), wishes, available_forms(function))

    monkeypatch.setattr(build, "plan_kv", plan)
    monkeypatch.setattr(build, "CudaCapture", lambda _device: capture)
    return capture
