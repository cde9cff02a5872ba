"""Reads a step's logits: draws tokens, and computes log-probabilities.

Everything is computed on the device and copied to the host together or, rarely, in two parts. A
step waits for the device only here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.torch.model.transfer import device_tensor, to_host
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.sampler import Draw, RowLogprobs, Sample, Scores, sample, score
from server.engine.torch.sampling.token_masks import allow, forbid
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from server.engine.torch.step.batch import Row


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """The next token of a sequence, and its log-probabilities if the request asked for them."""

    sequence: EngineSequence
    token: int
    logprobs: RowLogprobs | None


@dataclass(frozen=True, slots=True)
class RowResults:
    """The results of all rows of a step.

    All results of a sequence that has a row in `not_finite` are invalid.
    """

    not_finite: list[Row]  # rows whose largest logit is not finite
    scored: list[tuple[Row, RowLogprobs]]  # with the log-probabilities of the prompts' next tokens
    drawn: list[DrawnToken]


class _Computed(NamedTuple):
    """The tensors that are computed on the device, and then copied to the host."""

    finite: Tensor  # (rows,) bool
    sample: Sample
    # None if no request asks for log-probabilities, as is usual.
    prompts: Scores | None
    scores: Scores | None  # of the drawn tokens


def draw_and_score(
    rows: Sequence[Row], logits: Tensor, draws: Sequence[Draw], penalties: PenaltyTable
) -> RowResults:
    """Draw tokens, and compute log-probabilities.

    Waits for the device once, or twice if a row's filters keep unusually many tokens.

    Args:
        logits: (rows, vocabulary) float32, in the order of `rows`.
        draws: one for each row that draws, in the order of `rows`.
        penalties: the table that holds the draws' penalties.
    """
    scored = [i for i, row in enumerate(rows) if not row.draws]
    drawn = [i for i, row in enumerate(rows) if row.draws]
    finite = logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
    prompts = _score_prompts(rows, logits, scored) if scored else None
    logprob_counts = {
        i: count for i in drawn if (count := rows[i].sequence.request.sampling.logprobs) is not None
    }
    drawn_from = penalties.penalize(_select(logits, drawn), [draw.penalties for draw in draws])
    drawn_from = allow(drawn_from, [draw.mask for draw in draws])
    drawn_from = forbid(drawn_from, [draw.forbidden for draw in draws])
    inexact: list[int] = []
    while True:
        sampled = sample(drawn_from, draws, sorted_rows=inexact)
        scores = _score_drawn(logits, drawn, sampled, logprob_counts) if logprob_counts else None
        computed = to_host(_Computed(finite, sampled, prompts, scores))
        inexact = [place for place, exact in enumerate(computed.sample.exact.tolist()) if not exact]
        if not inexact:
            break
    logprobs = _by_row(computed.scores, logprob_counts)
    prompt_counts = {i: rows[i].sequence.request.sampling.prompt_logprobs or 0 for i in scored}
    return RowResults(
        [row for row, whole in zip(rows, computed.finite.tolist(), strict=True) if not whole],
        [(rows[i], found) for i, found in _by_row(computed.prompts, prompt_counts).items()],
        [
            DrawnToken(rows[i].sequence, token, logprobs.get(i))
            for i, token in zip(drawn, computed.sample.tokens.tolist(), strict=True)
        ],
    )


def _score_prompts(rows: Sequence[Row], logits: Tensor, scored: Sequence[int]) -> Scores:
    """Score the prompts' next tokens."""
    prompts = [rows[i] for i in scored]
    tokens = [row.sequence.tokens[row.position + 1] for row in prompts]
    most = max(row.sequence.request.sampling.prompt_logprobs or 0 for row in prompts)
    return score(_select(logits, scored), device_tensor(tokens, logits.device, torch.int64), most)


def _score_drawn(
    logits: Tensor, drawn: Sequence[int], sampled: Sample, logprob_counts: Mapping[int, int]
) -> Scores:
    """Score the drawn tokens of the rows in `logprob_counts`."""
    tokens = _select(
        sampled.tokens, [place for place, i in enumerate(drawn) if i in logprob_counts]
    )
    return score(_select(logits, list(logprob_counts)), tokens, max(logprob_counts.values()))


def _by_row(scores: Scores | None, counts: Mapping[int, int]) -> dict[int, RowLogprobs]:
    """Return each row's log-probabilities, with as many alternatives as `counts` says."""
    read = [] if scores is None else scores.read(list(counts.values()))
    return dict(zip(counts, read, strict=True))


def _select(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor, in order; without a copy if they are all or none."""
    if len(rows) == len(tensor):
        return tensor
    return tensor[device_tensor(rows, tensor.device)] if rows else tensor[:0]
