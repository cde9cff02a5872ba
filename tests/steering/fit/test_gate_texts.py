"""Tests of the split of a gate's sentences: disjoint, by the seed, and what is refused."""

from dataclasses import replace

import pytest

from steering.fit import FitError
from steering.fit.activations import TokenIds
from steering.fit.gate_settings import GateSettings
from steering.fit.gate_texts import split_texts


def test_a_split_is_disjoint_and_leaves_out_repetitions() -> None:
    source = [[1, 2], [3], [1, 2], [4, 5], [6], [7]]
    control = [[10 + row] for row in range(10)]
    settings = GateSettings(components=2, held_out=0.3)
    texts = split_texts(source, control, settings)
    assert sorted(map(list, texts.source + texts.held_out_source)) == [
        [1, 2],
        [3],
        [4, 5],
        [6],
        [7],
    ]
    assert sorted(map(list, texts.control + texts.held_out_control)) == control
    assert (len(texts.held_out_source), len(texts.held_out_control)) == (2, 3)
    assert split_texts(source, control, settings) == texts
    assert split_texts(source, control, replace(settings, seed=1)) != texts


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_both_parts_of_a_split_have_a_sentence(held_out: float) -> None:
    texts = split_texts([[1], [2]], [[3], [4]], GateSettings(components=1, held_out=held_out))
    assert len(texts.source) == len(texts.held_out_source) == 1
    assert len(texts.control) == len(texts.held_out_control) == 1


@pytest.mark.parametrize(
    ("source", "control", "message"),
    [
        ([[1], [2]], [], "the control has 0 different sentences"),
        ([], [[1], [2]], "the source has 0 different sentences"),
        ([[1], [2]], [[3], [3]], "the control has 1 different sentences"),
        ([[1], [2]], [[3], []], "a sentence of the control has no token"),
        ([[1], [2]], [[1], [2]], "2 of the control's 2 sentences are in the source too"),
        ([[1], [2], [3]], [[3], [4]], "1 of the control's 2 sentences are in the source too"),
        ([[1], [2]], [[3], [4]], "2 sentences .* have at most 1 .*, and 5 were asked for"),
    ],
)
def test_sentences_that_make_no_gate_are_refused(
    source: list[TokenIds], control: list[TokenIds], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        split_texts(source, control, GateSettings())
