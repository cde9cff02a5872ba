"""Checks on the device that attention over pages equals plain arithmetic.

A compiled kernel differs between versions of the compiler and kinds of GPUs, and may be silently
wrong. The check does what the engine does: it prefills prompts in chunks, decodes some sequences
beside the prefill of others, then decodes alone. Pages are in no order, and sequences end around
the borders of pages.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams, LaneSpan
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_attention import PagedMemory
from server.engine.torch.attention.paged_index import SPLITS, PagedAttention, Tiling
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.attention.staging import index_to_device

# The length of each sequence after each of four steps. In the last two, all sequences decode.
_LENGTHS: Final = (
    (1, 2, 3, 4),
    (PAGE - 1, PAGE, PAGE + 1, PAGE + 2),
    (PAGE, PAGE + 1, PAGE + 2, PAGE + 3),
    (PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1),
    (700, 701, 702, 703),
    (7, 407, 408, 409),
)
_WINDOW: Final = 100  # tried in place of the model's own window, which may exceed all lengths
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class WrongAttentionError(ArithmeticError):
    """Attention over pages differs from plain arithmetic."""


@torch.inference_mode()
def check_pages(
    attend: PagedAttention,
    shape: KVShape,
    tiling: Tiling,
    windowed: bool,
    softcap: float | None,
    lengths: Sequence[Sequence[int]] = _LENGTHS,
) -> None:
    """Raise WrongAttentionError unless attention equals plain arithmetic in float32.

    Args:
        windowed: whether any layer of the model has a sliding window.
        softcap: the soft cap of the model's scores, or None.
        lengths: each sequence's length after each step.
    """
    for window in (None, _WINDOW) if windowed else (None,):
        _check(attend, shape, tiling, AttentionParams(None, window, softcap), lengths)


def _check(
    attend: PagedAttention,
    shape: KVShape,
    tiling: Tiling,
    params: AttentionParams,
    lengths: Sequence[Sequence[int]],
) -> None:
    [device] = set(shape.devices)
    one_layer = KVShape(shape.kv_heads, shape.head_dim, shape.dtype, (device,))
    pages = 1 + sum(-(-each[-1] // PAGE) for each in lengths)
    memory = PagedMemory(one_layer, pages, tiling, attend)
    # NaN shows in the output if the kernel reads a token that was never written.
    for stored in memory.pool.layer(0):
        stored.fill_(torch.nan)
    random = torch.Generator().manual_seed(0)
    # For each sequence: its queries, keys and values, each (heads, tokens, head_dim).
    texts = [
        [
            torch.randn(number, ends[-1], shape.head_dim, generator=random).to(device, shape.dtype)
            for number in (tiling.heads, shape.kv_heads, shape.kv_heads)
        ]
        for ends in lengths
    ]
    expected = [_reference(text, params) for text in texts]
    lanes = [memory.lane() for _ in texts]
    done = [0] * len(texts)
    for step_ends in zip(*lengths, strict=True):
        spans = []
        # Sequences take pages in turns, so that a sequence's pages are not side by side.
        for lane, start, end in zip(lanes, done, step_ends, strict=True):
            lane.reserve(end)
            spans.append(LaneSpan(lane, start, end - start))
        step = memory.step(spans)
        query, key, value = (_packed([text[part] for text in texts], spans) for part in range(3))
        due = _packed(expected, spans)[0].transpose(0, 1)
        index = index_to_device(step.index, device)
        # A decoding step may use any of these numbers of splits, each by a kernel of its own.
        for splits in SPLITS if all(span.count == 1 for span in spans) else (1,):
            moved = step.moved(replace(index, splits=splits))
            _compare(moved.attend(0, query, key, value, params)[0], due, shape.dtype)
        done = list(step_ends)


def _packed(parts: Sequence[Tensor], spans: Sequence[LaneSpan]) -> Tensor:
    """Pack the spans' tokens of parts (heads, tokens, head_dim): (1, heads, tokens, head_dim).

    In memory tokens come before heads, as in a model.
    """
    taken = [
        part[:, span.start : span.start + span.count]
        for part, span in zip(parts, spans, strict=True)
    ]
    return torch.cat(taken, dim=1).transpose(0, 1).contiguous().transpose(0, 1)[None]


def _reference(text: Sequence[Tensor], params: AttentionParams) -> Tensor:
    """Attend for one whole sequence in plain arithmetic: (heads, tokens, head_dim) float32."""
    query, key, value = (part.float() for part in text)
    shared = len(query) // len(key)
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    places = torch.arange(query.shape[1], device=query.device)
    seen = places <= places[:, None]
    if params.window is not None:
        seen &= places > places[:, None] - params.window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    output: Tensor = weights @ value
    return output


def _compare(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise WrongAttentionError unless each token's output is within the tolerance."""
    difference = (got.float() - expected).flatten(1).norm(dim=1)
    worst = float((difference / expected.flatten(1).norm(dim=1)).max())
    if not worst < _TOLERANCE[dtype]:  # true for NaN, too
        raise WrongAttentionError(f"a token's output is off by {worst:.2g}")
