"""A slow reference for paged attention, and patches that make CPU engines use pages and graphs.

On a GPU, an engine keeps keys and values in pages, and replays decode steps from CUDA graphs. On a
CPU, it uses neither unless it is patched here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch import build
from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_index import PagedAttention, PagedIndex
from server.engine.torch.attention.plan import KVOptions, KVPlan, plan_pages, plan_slabs, tiling_of
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.core import EngineCore
from server.engine.torch.cuda import fast_path as cuda_fast_path
from server.engine.torch.options import EngineOptions


def paged_reference(
    query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, params: AttentionParams
) -> Tensor:
    """Attend one sequence after the other, with the arguments of a paged attention kernel."""
    output = torch.full_like(query, torch.nan)
    for place, (first, last) in enumerate(pairwise(index.query_ends.tolist())):
        length = int(index.lengths[place])
        pages = index.tables[place, : -(-length // PAGE)].long()
        own_keys, own_values = (each[pages].flatten(0, 1)[:length] for each in (keys, values))
        output[first:last] = _attend(query[first:last], own_keys, own_values, params)
    return output


def _attend(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    """Attend for one sequence, whose last query has the position of its last key."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1).float(), value.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key)
    scores *= query.shape[-1] ** -0.5 if params.scaling is None else params.scaling
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    places = torch.arange(len(key) - len(query), len(key), device=query.device)[:, None]
    keys = torch.arange(len(key), device=query.device)
    seen = keys <= places
    if params.window is not None:
        seen &= keys > places - params.window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


OPTIONS = EngineOptions(
    kv_cache_gb=0.02, max_batch_tokens=64, max_batch_size=20, check_invariants=True
)


class EagerCapture:
    """Stands in for CUDA graph capture: a replay calls the captured function again."""

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


def use_pages(
    monkeypatch: pytest.MonkeyPatch, attend: PagedAttention = paged_reference
) -> EagerCapture:
    """Make engines on this machine use CUDA's paths: pages, read by `attend`, and (fake) graphs."""
    capture = EagerCapture()

    def plan(model: PreTrainedModel, options: KVOptions) -> KVPlan:
        shape = KVShape.of(model)
        if options.attention == "slabs":
            return plan_slabs(shape, options)
        return plan_pages(shape, options, tiling_of(model, shape), attend)

    monkeypatch.setattr(build, "plan_kv", plan)
    monkeypatch.setattr(build, "fast_path_of", lambda _device: cuda_fast_path)
    monkeypatch.setattr(cuda_fast_path, "CudaCapture", lambda _device: capture)
    # Triton would interpret its kernels here, which is slow; the kernels have their own tests.
    monkeypatch.setattr(cuda_fast_path, "_use_kernels", lambda _parts: None)
    return capture


def make_all(core: EngineCore) -> None:
    """Make all pending graphs, as an idle engine does."""
    while core.make_pending():
        pass
    assert core.compiling == 0
