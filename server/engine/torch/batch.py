"""Builds one step's tensors and its route, once, from the scheduler's chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.torch.attention import AttentionStep, Segment
from server.engine.torch.scheduler import Chunk
from server.engine.torch.sequence import Sequence as EngineSequence
from server.engine.torch.slab import Slab
from steering.route import Route, Span, build_route


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a step's logits."""

    sequence: EngineSequence
    place: int  # of the token that it follows

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn from it; if not, it scores a prompt's next token."""
        return self.place == len(self.sequence.tokens) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All that a forward pass needs. Tokens of all sequences are packed in one row."""

    input_ids: Tensor  # (1, tokens) int64
    position_ids: Tensor  # (1, tokens) int64
    rows: Sequence[Row]  # of the logits that are needed
    logits_rows: Tensor  # (rows,) int64 on the CPU: which of the packed tokens they follow
    attention: AttentionStep
    route: Route


def build_batch(
    chunks: Sequence[Chunk], slabs: Mapping[EngineSequence, Slab], device: torch.device
) -> Batch:
    """The step's tensors; the rows are those of each chunk's `logits_places`, in order."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[Row] = []
    packed: list[int] = []  # where the rows' tokens are in `tokens`
    spans: list[Span] = []
    for chunk in chunks:
        sequence, places = chunk.sequence, chunk.logits_places
        offset = len(tokens) - chunk.start
        packed += [offset + place for place in places]
        rows += [Row(sequence, place) for place in places]
        tokens += sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        spans.append(
            Span(
                start=chunk.start,
                count=chunk.count,
                prompt_length=sequence.prompt_length,
                rows=range(len(rows) - len(places), len(rows)),
                edits=sequence.edits,
            )
        )
    segments = [Segment(slabs[chunk.sequence], chunk.start, chunk.count) for chunk in chunks]
    return Batch(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        rows=rows,
        # On the CPU because it indexes wherever the model's last layer is.
        logits_rows=torch.tensor(packed, dtype=torch.int64),
        attention=AttentionStep(segments),
        route=build_route(spans, device),
    )
