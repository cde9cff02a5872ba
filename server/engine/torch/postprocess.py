"""From a step's logits to the next tokens, and to what each of its sequences puts out."""

import logging
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from server.engine.base import (
    EngineError,
    InvalidRequestError,
    StepFailedError,
    StepOutput,
)
from server.engine.torch.answer import Answer
from server.engine.torch.batch import Row
from server.engine.torch.sampler import RowLogprobs, logprobs, sample
from server.engine.torch.scheduler import Chunk
from server.engine.torch.sequence import Sequence as EngineSequence
from server.engine.torch.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_FARTHEST: Final = 9999.0  # JSON has no infinity

Delivery: TypeAlias = tuple[EngineSequence, StepOutput | EngineError]


class Postprocessor:
    """Advances the sequences of a step. It frees nothing: whoever calls it does."""

    def __init__(self, vocabulary: Vocabulary, eos_tokens: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._eos_tokens = eos_tokens

    def run(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        logits: Tensor,
        answers: Mapping[EngineSequence, Answer],
    ) -> list[Delivery]:
        """Score prompts, draw tokens, make text.

        Args:
            logits: (rows, vocabulary) float32, in the order of `rows`.

        Returns:
            The outputs of the sequences that have any; at most one each.
        """
        read = [chunk.sequence for chunk in chunks if chunk.completes and not chunk.samples]
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        finite = logits.amax(dim=-1).isfinite().tolist()  # NaN counts as the largest
        lost = {
            row.sequence: _not_a_number(row)
            for row, whole in zip(rows, finite, strict=True)
            if not whole
        }
        scored = [i for i, row in enumerate(rows) if row.scores and row.sequence not in lost]
        lost |= self._score([rows[i] for i in scored], _select(logits, scored), answers)
        drawn = [i for i, row in enumerate(rows) if row.draws and row.sequence not in lost]
        moved = _divergences(rows, drawn, logits)
        return [
            *lost.items(),
            *((sequence, answers[sequence].read()) for sequence in read if sequence not in lost),
            *self._draw([rows[i].sequence for i in drawn], _select(logits, drawn), answers, moved),
        ]

    def _score(
        self, rows: Sequence[Row], logits: Tensor, answers: Mapping[EngineSequence, Answer]
    ) -> dict[EngineSequence, EngineError]:
        """Give the prompts' next tokens their log-probabilities; the sequences that failed."""
        tokens = [row.sequence.tokens[row.place + 1] for row in rows]
        counts = [row.sequence.request.sampling.prompt_logprobs or 0 for row in rows]
        lost: dict[EngineSequence, EngineError] = {}
        for row, token, value in zip(rows, tokens, logprobs(logits, tokens, counts), strict=True):
            try:
                answers[row.sequence].score(self._vocabulary.logprobs(token, value))
            except Exception:
                lost[row.sequence] = _text_failed()
        return lost

    def _draw(
        self,
        sequences: Sequence[EngineSequence],
        logits: Tensor,
        answers: Mapping[EngineSequence, Answer],
        divergences: Mapping[EngineSequence, float],
    ) -> list[Delivery]:
        """Draw the sequences' next tokens from their rows of logits."""
        if not sequences:
            return []
        tokens = sample(logits, [answers[sequence].draw() for sequence in sequences])
        found = _wanted_logprobs(sequences, tokens, logits)
        return [
            (
                sequence,
                self._append(answers[sequence], token, found.get(row), divergences.get(sequence)),
            )
            for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        ]

    def _append(
        self, answer: Answer, token: int, row: RowLogprobs | None, divergence: float | None
    ) -> StepOutput | EngineError:
        try:
            found = None if row is None else self._vocabulary.logprobs(token, row)
            return answer.append(token, found, self._eos_tokens, divergence)
        except Exception:
            return _text_failed()


def _wanted_logprobs(
    sequences: Sequence[EngineSequence], tokens: Sequence[int], logits: Tensor
) -> dict[int, RowLogprobs]:
    """By row, for the rows whose request wants them."""
    wanted = {
        row: count
        for row, sequence in enumerate(sequences)
        if (count := sequence.request.sampling.logprobs) is not None
    }
    rows = list(wanted)
    drawn = [tokens[row] for row in rows]
    values = logprobs(_select(logits, rows), drawn, list(wanted.values()))
    return dict(zip(rows, values, strict=True))


def _divergences(
    rows: Sequence[Row], drawn: Sequence[int], logits: Tensor
) -> dict[EngineSequence, float]:
    """How far steering has moved the distributions that tokens are drawn from, where it is asked.

    The Kullback-Leibler divergence of the base model's distribution from the steered one, in nats.
    """
    bases = {row.sequence: i for i, row in enumerate(rows) if row.base}
    places = {rows[i].sequence: i for i in drawn if rows[i].sequence in bases}
    found = {rows[i].sequence: 0.0 for i in drawn if rows[i].sequence.request.with_divergence}
    if places:
        steered = _select(logits, list(places.values())).log_softmax(dim=-1)
        base = _select(logits, [bases[sequence] for sequence in places]).log_softmax(dim=-1)
        terms = kl_div(base, steered, reduction="none", log_target=True)
        # A token that is impossible to both adds nothing; one that is to the base alone, a lot.
        values = terms.nan_to_num(nan=0.0).sum(dim=-1).clamp(0.0, _FARTHEST)
        found |= zip(places, values.tolist(), strict=True)
    return found


def _select(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, without a copy where they are all."""
    if len(rows) == len(logits):
        return logits
    return logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]


def _text_failed() -> EngineError:
    """What fails in one sequence's text, while it is handled, is not its neighbours' fault."""
    logger.exception("the text of a sequence failed")
    return StepFailedError("the engine failed while computing this request")


def _not_a_number(row: Row) -> EngineError:
    """Another model than the one asked for would answer; nobody gets that without being told."""
    if row.base or not row.sequence.edits:
        return StepFailedError("the model's output is not a number")
    return InvalidRequestError(
        "Steered like this, the model's output is not a number; choose weaker settings.",
        "steering",
        "steering_overflow",
    )
