"""Tests penalties that are kept on the device: they equal a slow reference's bit for bit.

A table on the device holds each sequence's penalized tokens in a segment, to which a step sends the
changes only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from server.engine.request import Request, SamplingSettings
from server.engine.torch.model.transfer import to_device
from server.engine.torch.sampling import penalty_table
from server.engine.torch.sampling.penalties import Penalties
from server.engine.torch.sampling.penalty_table import PenaltyTable
from tests.oracles import penalized

VOCABULARY = 300
CPU = torch.device("cpu")
SETTINGS = (
    SamplingSettings(1, repetition_penalty=1.3),
    SamplingSettings(1, repetition_penalty=0.01, logit_bias=((0, 100.0), (1, -100.0))),
    SamplingSettings(1, presence_penalty=1.5),
    SamplingSettings(1, frequency_penalty=-0.7, presence_penalty=0.3),
    SamplingSettings(1, logit_bias=((2, 4.0), (0, -100.0), (2, 0.1))),
    SamplingSettings(
        *(1, 0.9, 0.95, 6, 0.05, 1.1, 0.2, 0.4),
        logit_bias=tuple((token, token / 7 - 20) for token in range(0, VOCABULARY, 2)),
    ),
)


@dataclass(eq=False)
class Drawing:
    """A request in the middle of its completion, and its penalties."""

    settings: SamplingSettings
    prompt: tuple[int, ...]
    completion: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.penalties = Penalties(Request("test", self.prompt, self.settings))

    def push(self, token: int) -> None:
        self.completion.append(token)
        self.penalties.push(token)


def assert_as_the_oracle_says(
    table: PenaltyTable, drawings: Sequence[Drawing | None], logits: Tensor | None = None
) -> None:
    """Assert that penalized rows equal the reference bit for bit, and that `logits` is unchanged.

    Log-probabilities are computed from the unchanged logits.
    """
    if logits is None:
        logits = 5 * torch.randn(len(drawings), VOCABULARY)
    before = logits.clone()
    found = table.penalize(logits, [None if each is None else each.penalties for each in drawings])
    expected = [
        row if each is None else penalized(row, each.prompt, each.completion, each.settings)
        for row, each in zip(before, drawings, strict=True)
    ]
    assert torch.equal(found.view(torch.int32), torch.stack(expected).view(torch.int32))
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Random sequences start, skip steps and end, and every row equals the reference."""
    monkeypatch.setattr(penalty_table, "_LEAST", 2)  # makes segments too small after a few draws
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    table, living = PenaltyTable(CPU), list[Drawing]()
    for _ in range(150):
        while len(living) < 6 and chosen.random() < 0.5:
            length = chosen.choice((0, 1, 5, 200))
            prompt = tuple(chosen.randrange(VOCABULARY) for _ in range(length))
            living.append(Drawing(chosen.choice(SETTINGS), prompt))
        drawing = chosen.sample(living, chosen.randint(0, len(living)))
        logits = 5 * torch.randn(len(drawing) + 1, VOCABULARY, generator=generator)
        logits[:, 7] = chosen.choice((torch.inf, -torch.inf, torch.nan, 3e38, -0.0, 0.0))
        assert_as_the_oracle_says(table, [*drawing, None], logits)
        for each in drawing:
            each.push(chosen.randrange(chosen.choice((3, VOCABULARY))))  # often a repeated token
        for each in tuple(living):
            if chosen.random() < 0.05:
                living.remove(each)
                table.free(each.penalties)
        table.check([each.penalties for each in living])


def test_rows_that_change_nothing_cost_no_copy() -> None:
    table, logits = PenaltyTable(CPU), torch.randn(2, VOCABULARY)
    penalties = Penalties(Request("test", tuple(range(100)), SETTINGS[2]))
    assert table.penalize(logits, [None, penalties]) is logits
    assert table.penalize(logits[:0], []).shape == (0, VOCABULARY)
    table.check([])


def test_a_step_sends_what_is_new_whatever_was_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def counted(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        sent.append(sum(tensor.numel() for tensor in tensors))
        return to_device(tensors, device)

    monkeypatch.setattr(penalty_table, "to_device", counted)
    table, prompt = PenaltyTable(CPU), tuple(range(250))
    drawings = [Drawing(SETTINGS[0], prompt) for _ in range(3)]
    for token in range(30):
        assert_as_the_oracle_says(table, drawings)
        drawings[0].push(255 + token)
        drawings[1].push(token)
        drawings[1].push(token)  # two changes of one entry are sent as one
    assert len(sent) == 30, "one copy a step"
    assert sent[0] > 3 * 250
    # 3 numbers for each of the 3 rows (row, start and length of its segment), and 5 for each of the
    # 2 changes (place and entry).
    assert set(sent[1:]) == {3 * 3 + 2 * 5}


@pytest.mark.parametrize("name", ["_packed", "to_device", "_changed"])
@pytest.mark.parametrize("draws", [1, 100])
def test_a_step_that_fails_loses_nothing_of_anybody(
    monkeypatch: pytest.MonkeyPatch, name: str, draws: int
) -> None:
    """The step fails before or after its changes are applied, with or without outgrown segments."""

    def failing(*_: object) -> None:
        raise RuntimeError("no memory")

    table, kept, ends = PenaltyTable(CPU), Drawing(SETTINGS[3], (1,)), Drawing(SETTINGS[0], (2,))
    kept.push(1)
    assert_as_the_oracle_says(table, [kept, ends])
    for token in range(draws):
        kept.push(token)
        ends.push(token)
    with monkeypatch.context() as broken:
        broken.setattr(penalty_table, name, failing)
        with pytest.raises(RuntimeError, match="no memory"):
            table.penalize(torch.randn(2, VOCABULARY), [kept.penalties, ends.penalties])
    table.check([kept.penalties, ends.penalties])
    table.free(ends.penalties)
    assert_as_the_oracle_says(table, [Drawing(SETTINGS[1], (4, 5)), kept])
    kept.push(1)
    assert_as_the_oracle_says(table, [kept])


def test_what_ended_leaves_room_for_others() -> None:
    """The table's length depends on the living sequences only, not on how many have ended."""
    table, stays = PenaltyTable(CPU), Drawing(SETTINGS[0], (1, 2, 3))
    for length in (*range(0, 250, 5), *range(0, 250, 5)):
        passing = Drawing(SETTINGS[0], tuple(range(length)))
        assert_as_the_oracle_says(table, [passing, stays])
        table.free(passing.penalties)
        table.free(passing.penalties)  # freeing twice does nothing
        table.check([stays.penalties])
    assert len(table._entries) < 1500
    table.free(stays.penalties)
    table.check([])


def test_books_that_do_not_add_up_are_seen() -> None:
    table, drawing = PenaltyTable(CPU), Drawing(SETTINGS[0], (1, 2, 3))
    table.penalize(torch.randn(1, VOCABULARY), [drawing.penalties])
    with pytest.raises(AssertionError, match="has ended"):
        table.check([])
    table.free(drawing.penalties)
    with pytest.raises(AssertionError, match="neither sent"):
        table.check([drawing.penalties])
