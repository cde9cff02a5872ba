"""Builds one step's tensors and its route, once, from the scheduler's chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionStep, KVMemory, Lane, LaneSpan
from server.engine.torch.scheduling.scheduler import Chunk
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from steering.route import Route, Span, build_route


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a step's logits."""

    sequence: EngineSequence
    position: int  # the position, in the sequence, of the token that the logits follow

    @property
    def draws(self) -> bool:
        """True if the sequence's next token is drawn from the row; else it scores a prompt's."""
        return self.position == len(self.sequence.tokens) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All inputs of a forward pass. Tokens of all sequences are packed in one row."""

    input_ids: Tensor  # (1, tokens) int64
    position_ids: Tensor  # (1, tokens) int64
    rows: Sequence[Row]  # the logits rows that are needed
    logits_rows: Tensor  # (rows,) int64 on the CPU: the packed token that each row follows
    attention: AttentionStep
    route: Route
    spans: Sequence[Span]  # each sequence's tokens, in the order in which they are packed
    span_indices: Mapping[EngineSequence, int]  # each sequence's index in `spans`


def build_batch(
    chunks: Sequence[Chunk],
    lanes: Mapping[EngineSequence, Lane],
    memory: KVMemory,
    device: torch.device,
) -> Batch:
    """Build the step's tensors, with the chunks in the order that suits attention best.

    Args:
        lanes: each sequence's keys and values, in `memory`, with room for its chunk.
        device: the model's; tensors are made there, unless `memory.batch_device` names another.
    """
    device = memory.batch_device or device
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[Row] = []
    packed: list[int] = []  # the index in `tokens` of each row's token
    spans: list[Span] = []
    lane_spans: list[LaneSpan] = []
    span_indices: dict[EngineSequence, int] = {}
    for chunk, lane_span in _lane_spans(chunks, lanes, memory):
        sequence, needed = chunk.sequence, chunk.logits_positions
        span_indices[sequence] = len(spans)
        offset = len(tokens) - chunk.start
        packed += [offset + position for position in needed]
        rows += [Row(sequence, position) for position in needed]
        tokens += sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        lane_spans.append(lane_span)
        spans.append(
            Span(
                start=chunk.start,
                count=chunk.count,
                prompt_length=sequence.prompt_length,
                rows=range(len(rows) - len(needed), len(rows)),
                edits=sequence.edits,
            )
        )
    return Batch(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        rows=rows,
        # On the CPU, because the model's last layer, where it indexes, may be on any device.
        logits_rows=torch.tensor(packed, dtype=torch.int64),
        attention=memory.step(lane_spans),
        route=build_route(spans, device),
        spans=spans,
        span_indices=span_indices,
    )


def _lane_spans(
    chunks: Sequence[Chunk], lanes: Mapping[EngineSequence, Lane], memory: KVMemory
) -> list[tuple[Chunk, LaneSpan]]:
    """Pair each chunk with the span of its lane, in the order that suits attention best."""
    lane_spans = [
        (chunk, LaneSpan(lanes[chunk.sequence], chunk.start, chunk.count)) for chunk in chunks
    ]
    return sorted(lane_spans, key=lambda each: memory.order(each[1]))
