"""Turns a step's logits into the next tokens, and into the outputs of its sequences."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from server.engine.base import (
    EngineError,
    InvalidRequestError,
    StepFailedError,
    StepOutput,
    TokenLogprobs,
)
from server.engine.torch.sampling.answer import Answer
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.readout import Drawn, read_out
from server.engine.torch.sampling.sampler import RowLogprobs
from server.engine.torch.scheduling.scheduler import Chunk
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from server.engine.torch.step.batch import Row
from server.engine.torch.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Delivery: TypeAlias = tuple[EngineSequence, StepOutput | EngineError]


class Postprocessor:
    """Advances the sequences of a step. The caller frees what ended sequences hold."""

    def __init__(
        self, vocabulary: Vocabulary, eos_tokens: frozenset[int], penalties: PenaltyTable
    ) -> None:
        self._vocabulary = vocabulary
        self._eos_tokens = eos_tokens
        self._penalties = penalties

    def run(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        logits: Tensor,
        answers: Mapping[EngineSequence, Answer],
    ) -> list[Delivery]:
        """Score prompts, draw tokens, make text. Waits for the device as `read_out` does.

        Args:
            logits: (rows, vocabulary) float32, in the order of `rows`.

        Returns:
            The sequences that have an output or an error, each with one.
        """
        read = [chunk.sequence for chunk in chunks if chunk.completes and not chunk.draws]
        for chunk in chunks:
            chunk.sequence.computed_tokens += chunk.count
        draws = [answers[row.sequence].draw() for row in rows if row.draws]
        readout = read_out(rows, logits, draws, self._penalties)
        lost = {row.sequence: _not_a_number(row) for row in readout.not_numbers}
        lost |= self._score(readout.scored, lost, answers)
        return [
            *lost.items(),
            *((sequence, answers[sequence].read()) for sequence in read if sequence not in lost),
            *(
                (drawn.sequence, self._append(answers[drawn.sequence], drawn))
                for drawn in readout.drawn
                if drawn.sequence not in lost
            ),
        ]

    def _score(
        self,
        scored: Sequence[tuple[Row, RowLogprobs]],
        lost: Collection[EngineSequence],
        answers: Mapping[EngineSequence, Answer],
    ) -> dict[EngineSequence, EngineError]:
        """Store the prompts' log-probabilities. Return the sequences for which that failed."""
        failed: dict[EngineSequence, EngineError] = {}
        for row, value in scored:
            if row.sequence in lost:
                continue
            try:
                token = row.sequence.tokens[row.position + 1]
                answers[row.sequence].score(self._logprobs(token, value))
            except Exception:
                failed[row.sequence] = _text_failed()
        return failed

    def _append(self, answer: Answer, drawn: Drawn) -> StepOutput | EngineError:
        token, row = drawn.token, drawn.logprobs
        try:
            found = None if row is None else self._logprobs(token, row)
            return answer.append(token, found, self._eos_tokens)
        except Exception:
            return _text_failed()

    def _logprobs(self, token: int, row: RowLogprobs) -> TokenLogprobs:
        return self._vocabulary.logprobs(token, row.sampled, row.top)


def _text_failed() -> EngineError:
    """Log the exception that is being handled, and return an error for its sequence alone."""
    logger.exception("the text of a sequence failed")
    return StepFailedError("the engine failed while computing this request")


def _not_a_number(row: Row) -> EngineError:
    """Return the error for a row whose logits are not finite: its drawn token is meaningless."""
    if not row.sequence.edits:
        return StepFailedError("the model's output is not a number")
    return InvalidRequestError(
        "Steered like this, the model's output is not a number; choose weaker settings.",
        "steering",
        "steering_overflow",
    )
