"""Turns a step's logits into the next tokens, and into the outputs of its sequences."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Final, TypeAlias

from torch import Tensor

from server.engine.errors import EngineError, StepFailedError
from server.engine.output import StepOutput, TokenLogprobs
from server.engine.overflow import not_a_number
from server.engine.request import SamplingSettings
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.row_results import DrawnToken, draw_and_score
from server.engine.torch.sampling.sampler import Draw, RowLogprobs
from server.engine.torch.sampling.sequence_outputs import SequenceOutputs
from server.engine.torch.scheduling.scheduler import Chunk
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from server.engine.torch.step.batch import Row

_GREEDY: Final = SamplingSettings(max_tokens=1, temperature=0)

logger = logging.getLogger(__name__)

Delivery: TypeAlias = tuple[EngineSequence, StepOutput | EngineError]


class Postprocessor:
    """Advances the sequences of a step. The caller frees what ended sequences hold."""

    def __init__(self, vocabulary: Vocabulary, penalties: PenaltyTable) -> None:
        self._vocabulary = vocabulary
        self._penalties = penalties

    def run(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        logits: Tensor,
        outputs: Mapping[EngineSequence, SequenceOutputs],
    ) -> list[Delivery]:
        """Score prompts, draw tokens, make text. Waits for the device as `draw_and_score` does.

        Args:
            logits: (rows, vocabulary) float32, in the order of `rows`.

        Returns:
            The sequences that have an output or an error, each with one.
        """
        read = [chunk.sequence for chunk in chunks if chunk.completes and not chunk.draws]
        for chunk in chunks:
            chunk.sequence.computed_tokens += chunk.count
        draws, lost = _draws(rows, outputs)
        results = draw_and_score(rows, logits, draws, self._penalties)
        lost |= {row.sequence: not_a_number(row.sequence.request) for row in results.not_finite}
        lost |= self._score(results.scored, lost, outputs)
        return [
            *lost.items(),
            *(
                (sequence, outputs[sequence].only_output())
                for sequence in read
                if sequence not in lost
            ),
            *(
                (drawn.sequence, self._append(outputs[drawn.sequence], drawn))
                for drawn in results.drawn
                if drawn.sequence not in lost
            ),
        ]

    def _score(
        self,
        scored: Sequence[tuple[Row, RowLogprobs]],
        lost: Collection[EngineSequence],
        outputs: Mapping[EngineSequence, SequenceOutputs],
    ) -> dict[EngineSequence, EngineError]:
        """Store the prompts' log-probabilities. Return the sequences for which that failed."""
        failed: dict[EngineSequence, EngineError] = {}
        for row, value in scored:
            if row.sequence in lost:
                continue
            try:
                token = row.sequence.tokens[row.position + 1]
                outputs[row.sequence].add_prompt_logprobs(self._logprobs(token, value))
            except Exception:
                failed[row.sequence] = _text_failed()
        return failed

    def _append(self, outputs: SequenceOutputs, drawn: DrawnToken) -> StepOutput | EngineError:
        token, row = drawn.token, drawn.logprobs
        try:
            found = None if row is None else self._logprobs(token, row)
            return outputs.append_token(token, found)
        except EngineError as error:
            return error
        except Exception:
            return _text_failed()

    def _logprobs(self, token: int, row: RowLogprobs) -> TokenLogprobs:
        return self._vocabulary.logprobs(token, row.sampled, row.top, row.rank)


def _draws(
    rows: Sequence[Row], outputs: Mapping[EngineSequence, SequenceOutputs]
) -> tuple[list[Draw], dict[EngineSequence, EngineError]]:
    """Return how each row that draws is drawn from, and the sequences whose grammar fails."""
    draws: list[Draw] = []
    lost: dict[EngineSequence, EngineError] = {}
    for row in rows:
        if row.draws:
            try:
                draws.append(outputs[row.sequence].next_draw())
            except EngineError as error:
                lost[row.sequence] = error
                draws.append(Draw(_GREEDY, 0.0))  # its row is drawn from, and the draw dropped
    return draws, lost


def _text_failed() -> EngineError:
    """Log the exception that is being handled, and return an error for its sequence alone."""
    logger.exception("the text of a sequence failed")
    return StepFailedError("the engine failed while computing this request")
