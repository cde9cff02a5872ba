"""Draws the next token of every row, vectorised over rows with per-row settings.

A row draws by inverting its own cumulative distribution at its own uniform number, so the same
seed gives the same draw whatever else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.base import SamplingSettings
from server.engine.torch.penalties import Penalties, penalize

# Rows whose log-probabilities are computed at once: prompts can have many, vocabularies are wide.
_SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's settings, its uniform number in [0, 1), and what it changes in its logits."""

    settings: SamplingSettings
    uniform: float
    penalties: Penalties | None = None

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.settings.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether top-k, top-p or min-p removes tokens."""
        settings = self.settings
        return settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row: (rows, vocabulary) float32 -> token ids.

    The best logit of each row must be a finite number.
    """
    logits = _penalized(logits, draws)
    tokens = logits.argmax(dim=-1)
    for filtered in (False, True):
        rows = [
            row for row, draw in enumerate(draws) if not draw.greedy and draw.filtered is filtered
        ]
        if rows:
            draw_rows = _draw_filtered if filtered else _draw_unfiltered
            chosen = draw_rows(logits[rows], [draws[row] for row in rows])
            tokens[rows] = chosen
    drawn: list[int] = tokens.tolist()
    return drawn


def _penalized(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    rows = {row: draw.penalties for row, draw in enumerate(draws) if draw.penalties is not None}
    if not rows:
        return logits
    index = torch.tensor(list(rows), device=logits.device)
    return logits.index_copy(0, index, penalize(logits[index], list(rows.values())))


def _draw_unfiltered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    probabilities = torch.softmax(logits / _temperatures(draws, logits.device), dim=-1)
    return _invert(probabilities, draws)


def _draw_filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    scaled = logits / _temperatures(draws, logits.device)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    vocabulary = logits.shape[-1]
    min_p = column([draw.settings.min_p for draw in draws])
    top_k = column([draw.settings.top_k or vocabulary for draw in draws])
    top_p = column([draw.settings.top_p for draw in draws])
    # The first token is always kept, also by a min_p of 1 and a top_p that is 0 in float32.
    dropped = ordered < ordered[:, :1] + min_p.log()
    dropped |= torch.arange(vocabulary, device=logits.device) >= top_k
    ordered[:, 1:][dropped[:, 1:]] = -torch.inf
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[:, 1:][before[:, 1:] >= top_p] = 0
    return order.gather(-1, _invert(probabilities, draws)[:, None])[:, 0]


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Index of each row at which its cumulative weight first exceeds uniform * total."""
    cumulative = weights.double().cumsum(dim=-1)
    uniform = torch.tensor(
        [draw.uniform for draw in draws], dtype=torch.float64, device=weights.device
    )[:, None]
    target = uniform * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return index.clamp(max=weights.shape[-1] - 1)


def _temperatures(draws: Sequence[Draw], device: torch.device) -> Tensor:
    # Below float32's normal range a division overflows; such a temperature is greedy in effect.
    temperatures = [max(draw.settings.temperature, 1e-5) for draw in draws]
    return torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one row, before temperature and filters."""

    sampled: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[RowLogprobs]:
    """The log-probability of each row's token and its `count` best alternatives.

    Args:
        logits: (rows, vocabulary) float32.
    """
    found = []
    for first in range(0, len(tokens), _SCORED_ROWS):
        some = slice(first, first + _SCORED_ROWS)
        found += _logprobs(logits[some], tokens[some], counts[some])
    return found


def _logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[RowLogprobs]:
    log_probabilities = torch.log_softmax(logits, dim=-1)
    chosen = log_probabilities.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    values, indices = log_probabilities.topk(max(1, *counts), dim=-1)
    return [
        RowLogprobs(sampled, tuple(zip(row_indices[:count], row_values[:count], strict=True)))
        for sampled, row_indices, row_values, count in zip(
            chosen[:, 0].tolist(), indices.tolist(), values.tolist(), counts, strict=True
        )
    ]
