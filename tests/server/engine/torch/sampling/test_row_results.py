"""Tests reading results from logits rows: drawn tokens and log-probabilities."""

from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from server.engine.request import Request, SamplingSettings
from server.engine.torch.model.transfer import to_host
from server.engine.torch.sampling import row_results
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.row_results import RowResults, draw_and_score
from server.engine.torch.sampling.sampler import Draw
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.step.batch import Row

VOCABULARY = 3000
T = TypeVar("T")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list to which each wait for the device adds what was fetched."""
    copied: list[object] = []

    def counted(tree: T) -> T:
        copied.append(tree)
        return to_host(tree)

    monkeypatch.setattr(row_results, "to_host", counted)
    return copied


def sequence(sampling: SamplingSettings) -> Sequence:
    return Sequence.of(Request("test", (5, 6, 7), sampling))


def logits_of(rows: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def read(rows: list[Row], logits: torch.Tensor) -> RowResults:
    draws = [Draw(row.sequence.request.sampling, 0.4) for row in rows if row.draws]
    return draw_and_score(rows, logits, draws, PenaltyTable(logits.device))


def test_a_steps_results_are_copied_once(waits: list[object]) -> None:
    greedy = SamplingSettings(4, temperature=0)
    scoring = sequence(replace(greedy, logprobs=2, prompt_logprobs=1))
    filtered = sequence(SamplingSettings(4, top_p=0.9, logprobs=0))
    plain = sequence(SamplingSettings(4))
    rows = [
        Row(scoring, 0),
        Row(scoring, 1),
        Row(scoring, 2),
        Row(filtered, 2),
        Row(plain, 2),
    ]
    logits = logits_of(len(rows))
    expected = logits.log_softmax(-1)
    found = read(rows, logits)
    assert len(waits) == 1
    assert not found.not_finite
    assert [row.position for row, _ in found.scored] == [0, 1]
    for (row, value), token in zip(found.scored, (6, 7), strict=True):
        assert value.sampled == pytest.approx(float(expected[row.position, token]))
        assert len(value.top) == 1
    first, second, third = found.drawn
    assert [each.sequence for each in found.drawn] == [scoring, filtered, plain]
    assert first.token == int(logits[2].argmax())
    assert first.logprobs is not None
    assert [token for token, _ in first.logprobs.top] == logits[2].topk(2).indices.tolist()
    assert second.logprobs is not None
    assert second.logprobs.sampled == pytest.approx(float(expected[3, second.token]))
    assert second.logprobs.top == ()
    assert third.logprobs is None


def test_rows_whose_filters_keep_many_tokens_are_sorted_alone(waits: list[object]) -> None:
    """A row whose filters keep many tokens is drawn a second time, with other rows unchanged."""
    flat = sequence(SamplingSettings(4, top_p=0.99, logprobs=1))
    peaked = sequence(SamplingSettings(4, top_p=0.5, logprobs=1))
    logits = torch.cat((logits_of(1, spread=0.01), logits_of(1)))
    both = read([Row(flat, 2), Row(peaked, 2)], logits)
    assert len(waits) == 2
    [alone] = read([Row(peaked, 2)], logits[1:]).drawn
    assert len(waits) == 3
    assert both.drawn[1] == alone
    first = both.drawn[0]
    assert first.logprobs is not None
    assert first.logprobs.sampled == pytest.approx(float(logits[0].log_softmax(-1)[first.token]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "sampling",
    [SamplingSettings(4, temperature=0), SamplingSettings(4), SamplingSettings(4, top_p=0.5)],
)
def test_a_row_that_is_no_number_is_named_and_harms_nobody(
    value: float, sampling: SamplingSettings
) -> None:
    lost, kept = sequence(sampling), sequence(sampling)
    logits = logits_of(2)
    [expected] = read([Row(kept, 2)], logits[1:]).drawn
    logits[0, 7] = value
    found = read([Row(lost, 2), Row(kept, 2)], logits)
    assert [row.sequence for row in found.not_finite] == [lost]
    assert found.drawn[1] == expected


def test_a_step_without_rows_says_nothing() -> None:
    assert read([], logits_of(0)) == RowResults([], [], [])
