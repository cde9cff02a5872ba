"""Shows, on the device, that a form of variable-length attention computes what it should.

Kernels differ between versions of torch and kinds of GPUs, and some are silently wrong. What is
compared is what the engine does: prompts in chunks, then decoding beside a prompt, over pages in
no order, with lengths around their borders.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from server.engine.torch.attention_step import How, Piece
from server.engine.torch.loader import ModelLoadError
from server.engine.torch.page_pool import PAGE
from server.engine.torch.paged_attention import PagedMemory
from server.engine.torch.slab import SlabShape
from server.engine.torch.staging import stage_index
from server.engine.torch.varlen import VarlenForm

# Of each sequence: the tokens after each of three steps.
_LENGTHS: Final = (
    (1, 2, 3),
    (PAGE - 1, PAGE, PAGE + 1),
    (PAGE, PAGE + 1, PAGE + 2),
    (PAGE + 1, 2 * PAGE, 2 * PAGE + 1),
    (700, 701, 702),
    (7, 407, 408),
)
_WINDOW: Final = 100  # so that the lengths above exceed it, whatever the model's is
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def choose_form(
    forms: Sequence[VarlenForm], shape: SlabShape, heads: int, windowed: bool
) -> VarlenForm:
    """The first that computes what it should.

    Args:
        heads: of queries.
        windowed: whether any layer of the model has a sliding window.

    Raises:
        ModelLoadError: none does, with what is wrong with each.
    """
    wrong = []
    for form in forms:
        try:
            for window in (None, _WINDOW) if windowed else (None,):
                check_form(form, shape, heads, window)
        except Exception as error:
            wrong.append(f"{type(form).__name__}: {error}")
        else:
            return form
    raise ModelLoadError(
        f"torch {torch.__version__} has no attention that computes rightly here: {'; '.join(wrong)}"
    )


@torch.inference_mode()
def check_form(form: VarlenForm, shape: SlabShape, heads: int, window: int | None) -> None:
    """Raise ModelLoadError unless a form gives what plain arithmetic in float32 gives."""
    [device] = set(shape.devices)
    one_layer = SlabShape(shape.kv_heads, shape.head_dim, shape.dtype, (device,))
    memory = PagedMemory(one_layer, 1 + sum(-(-each[-1] // PAGE) for each in _LENGTHS), form)
    how = How(None, window, None)
    random = torch.Generator().manual_seed(0)
    # Of each sequence: queries, keys, values, each (heads, tokens, head_dim).
    texts = [
        [
            torch.randn(number, ends[-1], shape.head_dim, generator=random).to(device, shape.dtype)
            for number in (heads, shape.kv_heads, shape.kv_heads)
        ]
        for ends in _LENGTHS
    ]
    lanes = [memory.lane() for _ in texts]
    done = [0] * len(texts)
    outputs: list[list[Tensor]] = [[] for _ in texts]
    for step_ends in zip(*_LENGTHS, strict=True):
        pieces = []
        # Sequences grow in turns, so that nobody's pages lie side by side.
        for lane, start, end in zip(lanes, done, step_ends, strict=True):
            lane.reserve(end)
            pieces.append(Piece(lane, start, end - start))
        step = memory.step(pieces)
        query, key, value = (_packed([text[part] for text in texts], pieces) for part in range(3))
        output = step.moved(stage_index(step.index, device)).attend(0, query, key, value, how)[0]
        split = torch.split(output, [piece.count for piece in pieces])
        for own, part in zip(outputs, split, strict=True):
            own.append(part)
        done = list(step_ends)
    for text, parts in zip(texts, outputs, strict=True):
        _compare(torch.cat(parts), _reference(text, window), shape.dtype)


def _packed(parts: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """The pieces of (heads, tokens, head_dim) each, as (1, heads, tokens, head_dim)."""
    taken = [
        part[:, piece.start : piece.start + piece.count]
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return torch.cat(taken, dim=1)[None]


def _reference(text: Sequence[Tensor], window: int | None) -> Tensor:
    """(tokens, heads, head_dim) float32: one sequence from its first token on."""
    query, key, value = (part.float() for part in text)
    shared = len(query) // len(key)
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    places = torch.arange(query.shape[1], device=query.device)
    seen = places <= places[:, None]
    if window is not None:
        seen &= places > places[:, None] - window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    output: Tensor = weights @ value
    return output.transpose(0, 1)


def _compare(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise ModelLoadError unless each token's outputs are equal, nearly."""
    difference = (got.float() - expected).flatten(1).norm(dim=1)
    worst = float((difference / expected.flatten(1).norm(dim=1)).max())
    if not worst < _TOLERANCE[dtype]:  # also where it is not a number
        raise ModelLoadError(f"a token's output is off by {worst:.2g}")
