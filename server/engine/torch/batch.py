"""Builds one step's tensors and its route, once, from the scheduler's chunks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.torch.attention import AttentionStep, Segment, Slab
from server.engine.torch.scheduler import Chunk, Sequence
from steering.route import Route, Span, build_route


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All that a forward pass needs. Tokens of all sequences are packed in one row."""

    input_ids: Tensor  # (1, tokens) int64
    position_ids: Tensor  # (1, tokens) int64
    logits_rows: Tensor  # (rows,) int64: the tokens after which a next one is drawn
    attention: AttentionStep
    route: Route


def build_batch(chunks: list[Chunk], slabs: Mapping[Sequence, Slab], device: torch.device) -> Batch:
    """The step's tensors; `logits_rows` has one row for each chunk that samples, in order."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    spans: list[Span] = []
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        tokens += sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        first_row = len(rows)
        if chunk.samples:
            rows.append(len(tokens) - 1)
        spans.append(
            Span(
                start=chunk.start,
                count=chunk.count,
                prompt_length=sequence.prompt_length,
                rows=range(first_row, len(rows)),
                edits=sequence.edits,
            )
        )
    segments = [Segment(slabs[chunk.sequence], chunk.start, chunk.count) for chunk in chunks]
    return Batch(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        attention=AttentionStep(segments),
        route=build_route(spans, device),
    )
