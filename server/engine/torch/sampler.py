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
# Tokens among which top-k, top-p and min-p are tried first. The same for all rows: how equal
# logits are ordered may depend on it.
_BEST = 1024
_ALL = torch.iinfo(torch.int64).max


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
    logits = penalize(logits, [draw.penalties for draw in draws])
    tokens = logits.argmax(dim=-1)
    for filtered, draw_rows in ((False, _draw_unfiltered), (True, _draw_filtered)):
        rows = [
            row for row, draw in enumerate(draws) if not draw.greedy and draw.filtered is filtered
        ]
        if rows:
            tokens[rows] = draw_rows(logits[rows], [draws[row] for row in rows])
    drawn: list[int] = tokens.tolist()
    return drawn


def _draw_unfiltered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    return _invert(torch.softmax(_scaled(logits, draws), dim=-1), draws)


def _draw_filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw from the best tokens only, where they are sure to hold all that the filters keep.

    Sorting a whole vocabulary costs several times what finding its best tokens does.
    """
    scaled = _scaled(logits, draws)
    best = min(_BEST, scaled.shape[-1])
    ordered, order = scaled.topk(best, dim=-1)
    weights, sure = _filter(ordered, scaled.logsumexp(dim=-1, keepdim=True), draws)
    tokens = order.gather(-1, _invert(weights, draws)[:, None])[:, 0]
    rest = [row for row, found in enumerate(sure.tolist()) if not found]
    if rest and best < scaled.shape[-1]:
        ordered, order = scaled[rest].sort(dim=-1, descending=True, stable=True)
        few = [draws[row] for row in rest]
        weights, _ = _filter(ordered, ordered.logsumexp(dim=-1, keepdim=True), few)
        tokens[rest] = order.gather(-1, _invert(weights, few)[:, None])[:, 0]
    return tokens


def _filter(ordered: Tensor, total: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """The weights that min-p, then top-k, then top-p leave of each row's best tokens.

    Args:
        ordered: (rows, k) float32, the k largest of each row's logits by temperature, best first.
        total: (rows, 1) float32, the logarithm of the summed exponentials of the whole row.

    Returns:
        (rows, k) float32 weights, 0 where dropped; (rows,) bool, whether the filters drop all
        that is not among the k.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=ordered.device)[:, None]

    size = ordered.shape[-1]
    min_p = column([draw.settings.min_p for draw in draws])
    top_k = column([draw.settings.top_k or _ALL for draw in draws])
    top_p = column([draw.settings.top_p for draw in draws])
    kept = ordered >= ordered[:, :1] + min_p.log()
    kept &= torch.arange(size, device=ordered.device) < top_k
    kept[:, 0] = True  # also by a min_p of 1
    # What is kept is a beginning of the row: if it ends within the k, its sum is top-p's whole;
    # if nothing but top-p drops any, the row's is.
    ends = ~kept[:, -1:]
    only_top_p = (min_p == 0) & (top_k == _ALL)
    whole = torch.where(
        ends, ordered.masked_fill(~kept, -torch.inf).logsumexp(dim=-1, keepdim=True), total
    )
    weights = torch.where(kept, (ordered - whole).exp(), 0.0)
    before = weights.cumsum(dim=-1) - weights
    nucleus = before < top_p
    nucleus[:, 0] = True  # also by a top_p that is 0 in float32
    sure = ends | (only_top_p & ~nucleus[:, -1:])
    return torch.where(nucleus, weights, 0.0), sure[:, 0]


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Index of each row at which its cumulative weight first exceeds uniform * total."""
    cumulative = weights.double().cumsum(dim=-1)
    uniform = torch.tensor(
        [draw.uniform for draw in draws], dtype=torch.float64, device=weights.device
    )[:, None]
    target = uniform * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return index.clamp(max=weights.shape[-1] - 1)


def _scaled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits by temperature, the best of each row at 0 so that nothing overflows."""
    # Below float32's normal range a division overflows; such a temperature is greedy in effect.
    temperatures = [max(draw.settings.temperature, 1e-5) for draw in draws]
    column = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
    return (logits - logits.amax(dim=-1, keepdim=True)) / column


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
