"""Draws the next token of every row, vectorised over rows with per-row settings.

A row draws by inverting its own cumulative distribution at its own uniform number, so the same
seed gives the same draw whatever else is in the batch. Weights are added up as integers: torch's
cumulative sums of floats on a GPU need not be the same in every run, those of integers are.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from server.engine.base import SamplingSettings
from server.engine.torch.model.transfer import send
from server.engine.torch.sampling.penalties import Penalties

# Rows whose log-probabilities are computed at once: prompts can have many, vocabularies are wide.
_SCORED_ROWS = 64
# Tokens among which top-k, top-p and min-p are tried first. The same for all rows: how equal
# logits are ordered may depend on it.
_BEST = 1024
_ALL = torch.iinfo(torch.int64).max
# The weight 1 in fixed point. A row's weights sum to about 1, and any sum up to 2 is exact in
# float64 too. A token that weighs less than a unit is never drawn.
_ONE: Final = 2**52


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


class Sample(NamedTuple):
    """The next token of each row, on the device of its logits."""

    tokens: Tensor  # (rows,) int64
    # (rows,) bool; false where the filters may keep more tokens than those among which it was
    # drawn: such a row must be sorted.
    sure: Tensor


def sample(logits: Tensor, draws: Sequence[Draw], sorted_rows: Collection[int] = ()) -> Sample:
    """Draw the next token of each row; nothing waits for the device.

    Args:
        logits: (rows, vocabulary) float32, with what the draws' penalties change. What is drawn
            from a row whose best is not a finite number is any token.
        sorted_rows: whose whole vocabulary is sorted; they are always sure.
    """
    tokens = logits.argmax(dim=-1)
    sure = torch.ones_like(tokens, dtype=torch.bool)
    by_way: dict[_Way, list[int]] = {}
    for row, draw in enumerate(draws):
        if not draw.greedy:
            by_way.setdefault(_way(draw, row in sorted_rows), []).append(row)
    for way, rows in by_way.items():
        places = send(rows, logits.device)
        tokens[places], sure[places] = way(logits[places], [draws[row] for row in rows])
    return Sample(tokens, sure)


_Way: TypeAlias = Callable[[Tensor, Sequence[Draw]], tuple[Tensor, Tensor]]


def _way(draw: Draw, sort: bool) -> _Way:
    if not draw.filtered:
        return _draw_of_all
    return _draw_of_sorted if sort else _draw_of_best


def _draw_of_all(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    tokens = _invert(_fixed(torch.softmax(_scaled(logits, draws), dim=-1)), draws)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def _draw_of_best(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Draw from the best tokens only, and say where they hold all that the filters keep.

    Sorting a whole vocabulary costs several times what finding its best tokens does.
    """
    scaled = _scaled(logits, draws)
    vocabulary = scaled.shape[-1]
    ordered, order = scaled.topk(min(_BEST, vocabulary), dim=-1)
    weights, sure = _filter(ordered, scaled.logsumexp(dim=-1, keepdim=True), draws)
    tokens = order.gather(-1, _invert(weights, draws)[:, None])[:, 0]
    return tokens, sure if vocabulary > _BEST else torch.ones_like(sure)


def _draw_of_sorted(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    ordered, order = _scaled(logits, draws).sort(dim=-1, descending=True, stable=True)
    weights, sure = _filter(ordered, ordered.logsumexp(dim=-1, keepdim=True), draws)
    tokens = order.gather(-1, _invert(weights, draws)[:, None])[:, 0]
    return tokens, torch.ones_like(sure)


def _filter(ordered: Tensor, total: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """The weights that min-p, then top-k, then top-p leave of each row's best tokens.

    Args:
        ordered: (rows, k) float32, the k largest of each row's logits by temperature, best first.
        total: (rows, 1) float32, the logarithm of the summed exponentials of the whole row.

    Returns:
        (rows, k) int64 weights in units of 1 / _ONE, 0 where dropped; (rows,) bool, whether the
        filters drop all that is not among the k.
    """

    def column(values: Sequence[float]) -> Tensor:
        return send(values, ordered.device)[:, None]

    size = ordered.shape[-1]
    min_p = column([draw.settings.min_p for draw in draws])
    top_k = column([draw.settings.top_k or _ALL for draw in draws])
    nucleus_ends = column([_nucleus_end(draw.settings.top_p) for draw in draws])
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
    weights = _fixed(torch.where(kept, (ordered - whole).exp(), 0.0))
    nucleus = weights.cumsum(dim=-1) - weights < nucleus_ends
    sure = ends | (only_top_p & ~nucleus[:, -1:])
    return torch.where(nucleus, weights, 0), sure[:, 0]


def _nucleus_end(top_p: float) -> int:
    """What the weights before a token of the nucleus sum to less than; at least 1, for the best."""
    # Where all is to be kept, a sum that rounding has made larger than 1 must not drop any.
    return _ALL if top_p >= 1 else max(1, math.ceil(top_p * _ONE))


def _fixed(weights: Tensor) -> Tensor:
    """Weights in units of 1 / _ONE, rounded down: int64 of float32. NaN weighs nothing."""
    return (weights * _ONE).nan_to_num(nan=0.0).long()


def _invert(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The first index of each row up to which its weights sum to more than uniform * total.

    Args:
        weights: (rows, k) int64, of what `_fixed` gives.

    Returns:
        (rows,) int64: of a token that weighs something, where the row has any.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = send([draw.uniform for draw in draws], weights.device, torch.float64)[:, None]
    # The product may be rounded up to the total itself, which nothing exceeds. What is less than
    # the last of a row is found in the row, even if its total is 0.
    target = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _scaled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits by temperature, the best of each row at 0 so that nothing overflows."""
    # Below float32's normal range a division overflows; such a temperature is greedy in effect.
    temperatures = [max(draw.settings.temperature, 1e-5) for draw in draws]
    column = send(temperatures, logits.device, torch.float32)[:, None]
    return (logits - logits.amax(dim=-1, keepdim=True)) / column


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities of one row, before temperature and filters."""

    sampled: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


class Scores(NamedTuple):
    """The same of n rows, in tensors; of k alternatives, as many as the row that wants most."""

    sampled: Tensor  # (n,) float32
    values: Tensor  # (n, k) float32
    tokens: Tensor  # (n, k) int64

    def read(self, counts: Sequence[int]) -> list[RowLogprobs]:
        """Each row's, with as many alternatives as it wants. Waits for the device."""
        return [
            RowLogprobs(sampled, tuple(zip(tokens[:count], values[:count], strict=True)))
            for sampled, values, tokens, count in zip(
                self.sampled.tolist(),
                self.values.tolist(),
                self.tokens.tolist(),
                counts,
                strict=True,
            )
        ]


def score(logits: Tensor, tokens: Tensor, alternatives: int) -> Scores:
    """Score each row's token and its best alternatives by their log-probabilities.

    They are logits less the row's `logsumexp`, in float32. torch's `log_softmax` adds up a wide
    row otherwise: each of its values is off by up to 5e-5 to the same side, so that a text's sum
    drifts with its length.

    Args:
        logits: (rows, vocabulary) float32, of one row or more.
        tokens: (rows,) int64.
    """
    parts = []
    pieces = (torch.split(tensor, _SCORED_ROWS) for tensor in (logits, tokens))
    for some, chosen in zip(*pieces, strict=True):
        total = some.logsumexp(dim=-1, keepdim=True)
        best = some.topk(max(1, alternatives), dim=-1)
        sampled = (some.gather(-1, chosen[:, None]) - total)[:, 0]
        parts.append(Scores(sampled, best.values - total, best.indices))
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
