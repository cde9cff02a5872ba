"""Draws the next token of every row, vectorised over rows with per-row settings.

A row draws by inverting its own cumulative distribution at its own uniform number, so the same
seed gives the same draw whatever else is in the batch. Weights are summed as integers: on a
GPU, torch's cumulative sums of floats may differ from run to run, and those of integers do not.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from server.engine.request import SamplingSettings
from server.engine.torch.model.transfer import device_tensor
from server.engine.torch.sampling.penalties import Penalties

# Rows whose log-probabilities are computed at once. It bounds the memory: prompts can have many
# rows, and vocabularies are large.
_SCORED_ROWS = 64
# The number of a row's best tokens to which top-k, top-p and min-p are applied first. It is the
# same for all rows, because the order of equal logits may depend on it.
_BEST = 1024
_ALL = torch.iinfo(torch.int64).max
# The weight 1 in fixed point. A row's weights sum to about 1, and any sum up to 2 is exact in
# float64 too. A token that weighs less than one unit is never drawn.
_ONE: Final = 2**52


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's settings, its uniform random number in [0, 1), and what changes its logits."""

    settings: SamplingSettings
    uniform: float
    penalties: Penalties | None = None
    mask: bytes | None = None  # the tokens that its grammar allows, if it has one
    forbidden: frozenset[int] = frozenset()  # tokens that must not be drawn


class Sample(NamedTuple):
    """The next token of each row, on the device of its logits."""

    tokens: Tensor  # (rows,) int64
    # (rows,) bool; false if the filters may keep tokens beyond the `_BEST` that were drawn from.
    # Such a row must be drawn again, with its whole vocabulary sorted.
    exact: Tensor


def sample(logits: Tensor, draws: Sequence[Draw], sorted_rows: Collection[int] = ()) -> Sample:
    """Draw the next token of each row, without waiting for the device.

    Args:
        logits: (rows, vocabulary) float32, with the draws' penalties and masks applied. A row whose
            largest logit is not finite gives an arbitrary token.
        sorted_rows: rows whose whole vocabulary is sorted; these are always exact.
    """
    tokens = logits.argmax(dim=-1)
    exact = torch.ones_like(tokens, dtype=torch.bool)
    by_method: dict[_Method, list[int]] = {}
    for row, draw in enumerate(draws):
        if draw.settings.temperature != 0:  # otherwise the best token is taken
            by_method.setdefault(_method(draw, row in sorted_rows), []).append(row)
    for method, rows in by_method.items():
        places = device_tensor(rows, logits.device)
        tokens[places], exact[places] = method(logits[places], [draws[row] for row in rows])
    return Sample(tokens, exact)


_Method: TypeAlias = Callable[[Tensor, Sequence[Draw]], tuple[Tensor, Tensor]]


def _method(draw: Draw, sort: bool) -> _Method:
    settings = draw.settings
    if settings.top_k <= 0 and settings.top_p >= 1 and settings.min_p <= 0:
        return _draw_from_all
    return _draw_from_sorted if sort else _draw_from_best


def _draw_from_all(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    tokens = _invert(_to_fixed_point(torch.softmax(_scaled(logits, draws), dim=-1)), draws)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def _draw_from_best(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Draw from the best tokens only; tell for which rows these include all that filters keep.

    Sorting a whole vocabulary costs several times as much as finding its best tokens.
    """
    scaled = _scaled(logits, draws)
    vocabulary = scaled.shape[-1]
    ordered, order = scaled.topk(min(_BEST, vocabulary), dim=-1)
    weights, exact = _filter(ordered, scaled.logsumexp(dim=-1, keepdim=True), draws)
    tokens = order.gather(-1, _invert(weights, draws)[:, None])[:, 0]
    return tokens, exact if vocabulary > _BEST else torch.ones_like(exact)


def _draw_from_sorted(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    ordered, order = _scaled(logits, draws).sort(dim=-1, descending=True, stable=True)
    weights, exact = _filter(ordered, ordered.logsumexp(dim=-1, keepdim=True), draws)
    tokens = order.gather(-1, _invert(weights, draws)[:, None])[:, 0]
    return tokens, torch.ones_like(exact)


def _filter(ordered: Tensor, total: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Return the weights of each row's best tokens after min-p, then top-k, then top-p.

    Args:
        ordered: (rows, k) float32, each row's k largest logits over temperature, best first.
        total: (rows, 1) float32, the logsumexp of the whole row.

    Returns:
        (rows, k) int64: weights in units of 1 / _ONE, 0 for dropped tokens. (rows,) bool: True only
        if the filters drop every token that is not among the k, as far as the k tokens show.
    """

    def column(values: Sequence[float]) -> Tensor:
        return device_tensor(values, ordered.device)[:, None]

    size = ordered.shape[-1]
    min_p = column([draw.settings.min_p for draw in draws])
    top_k = column([draw.settings.top_k or _ALL for draw in draws])
    nucleus_ends = column([_nucleus_end(draw.settings.top_p) for draw in draws])
    kept = ordered >= ordered[:, :1] + min_p.log()
    kept &= torch.arange(size, device=ordered.device) < top_k
    kept[:, 0] = True  # the best token is never dropped, even by a min_p of 1
    # Min-p and top-k keep a prefix of the sorted row, and top-p is a share of that prefix's weight.
    # If the prefix ends within the k, its weight is known; if only top-p filters, it is the row's.
    ends = ~kept[:, -1:]
    only_top_p = (min_p == 0) & (top_k == _ALL)
    whole = torch.where(
        ends, ordered.masked_fill(~kept, -torch.inf).logsumexp(dim=-1, keepdim=True), total
    )
    weights = _to_fixed_point(torch.where(kept, (ordered - whole).exp(), 0.0))
    nucleus = weights.cumsum(dim=-1) - weights < nucleus_ends
    exact = ends | (only_top_p & ~nucleus[:, -1:])
    return torch.where(nucleus, weights, 0), exact[:, 0]


def _nucleus_end(top_p: float) -> int:
    """Return the sum that the weights before a token must stay below for top-p to keep the token.

    It is at least 1 unit, so that the best token is kept.
    """
    # With a top_p of 1, a sum that rounding has made larger than 1 must not drop any token.
    return _ALL if top_p >= 1 else max(1, math.ceil(top_p * _ONE))


def _to_fixed_point(weights: Tensor) -> Tensor:
    """Convert float32 weights to int64, in units of 1 / _ONE, rounded down. NaN becomes 0."""
    return (weights * _ONE).nan_to_num(nan=0.0).long()


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return each row's first index up to which its weights sum to more than uniform * total.

    Args:
        weights: (rows, k) int64, in the units of `_to_fixed_point`.

    Returns:
        (rows,) int64: the index of a token with a positive weight, if the row has any.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = device_tensor([draw.uniform for draw in draws], weights.device, torch.float64)[
        :, None
    ]
    # The product may be rounded up to the total itself, which no cumulative sum exceeds. A target
    # of total - 1 is always exceeded within the row, even if the total is 0.
    target = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _scaled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return logits over temperature, shifted so that each row's best is 0.

    So only other tokens can overflow, to -inf, which gives them a weight of 0.
    """
    # A temperature too small for float32 would become 0, and the best token's 0 / 0 is NaN. A draw
    # at 1e-5 is greedy already, but for nearly equal logits.
    temperatures = [max(draw.settings.temperature, 1e-5) for draw in draws]
    column = device_tensor(temperatures, logits.device, torch.float32)[:, None]
    return (logits - logits.amax(dim=-1, keepdim=True)) / column


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one row, before penalties, temperature and filters."""

    sampled: float
    rank: int  # the sampled token's place among all, 1 for the likeliest
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


class Scores(NamedTuple):
    """Log-probabilities of n rows; k is the largest number of alternatives that a row wants."""

    sampled: Tensor  # (n,) float32
    ranks: Tensor  # (n,) int64, of the sampled tokens, 1 for the likeliest
    values: Tensor  # (n, k) float32
    tokens: Tensor  # (n, k) int64

    def read(self, counts: Sequence[int]) -> list[RowLogprobs]:
        """Return each row's log-probabilities, with `counts` alternatives. Waits for the device."""
        return [
            RowLogprobs(sampled, rank, tuple(zip(tokens[:count], values[:count], strict=True)))
            for sampled, rank, values, tokens, count in zip(
                self.sampled.tolist(),
                self.ranks.tolist(),
                self.values.tolist(),
                self.tokens.tolist(),
                counts,
                strict=True,
            )
        ]


def score(logits: Tensor, tokens: Tensor, alternatives: int) -> Scores:
    """Return the log-probabilities of each row's token and of its best alternatives.

    They are the logits minus the row's `logsumexp`, in float32. torch's `log_softmax` sums a wide
    row differently: its values are off by up to 5e-5, all in one direction, so that a text's sum
    would drift with its length.

    Args:
        logits: (rows, vocabulary) float32, with at least one row.
        tokens: (rows,) int64.
    """
    parts = []
    pieces = (torch.split(tensor, _SCORED_ROWS) for tensor in (logits, tokens))
    for some, chosen in zip(*pieces, strict=True):
        total = some.logsumexp(dim=-1, keepdim=True)
        best = some.topk(max(1, alternatives), dim=-1)
        logit = some.gather(-1, chosen[:, None])
        ranks = (some > logit).sum(dim=-1) + 1
        parts.append(Scores((logit - total)[:, 0], ranks, best.values - total, best.indices))
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
