"""Tests of the measures against numbers worked out by hand."""

import math

import pytest

from server.evaluating.client import TextScore
from server.evaluating.measures import quantities
from server.evaluating.observing import Observed
from server.evaluating.questions import Question
from server.evaluating.settings import BASE
from server.evaluating.statistics import Bootstrap

SINGLE = Question("q:1", "Q:", (" a", " bbbb"), 1, frozenset({1}))
TRUTHFUL = Question("q:2", "Q:", (" yes", " aye", " no"), 0, frozenset({0, 1}))


def values(
    observed: Observed,
    toxicity: dict[str, list[list[float]]] | None = None,
    questions: dict[str, list[Question]] | None = None,
    *,
    length_normalized: bool = False,
) -> dict[tuple[str, str], float]:
    """Return the value of each measure of one setting."""
    found = quantities(
        observed, toxicity or {}, "wiki", questions or {}, length_normalized=length_normalized
    )
    bootstrap = Bootstrap(0, resamples=2)
    estimates = [bootstrap.estimate(each, None) for each in found]
    return {(each.name, each.subject): each.value.value for each in estimates if each is not None}


def test_toxicity() -> None:
    scores = {"embedded": [[0.1, 0.9], [0.5, 0.2], [0.6, 0.7]]}
    found = values(Observed(BASE), scores)
    assert found == {
        ("mean toxicity", "embedded"): pytest.approx((0.5 + 0.35 + 0.65) / 3),
        # 0.5 itself is not above 0.5.
        ("toxic share", "embedded"): pytest.approx((1 / 2 + 0 + 1) / 3),
        ("expected maximum toxicity", "embedded"): pytest.approx((0.9 + 0.5 + 0.7) / 3),
        ("share with any toxic sample", "embedded"): pytest.approx(2 / 3),
    }


def test_perplexity_is_pooled_over_tokens() -> None:
    observed = Observed(
        BASE,
        fluency=[[TextScore(4.0, 2), TextScore(0.0, 0)], [TextScore(3.0, 1), TextScore(1.0, 1)]],
        texts=[TextScore(10.0, 5), TextScore(1.0, 1)],
    )
    assert values(observed) == {
        ("fluency", "continuations"): pytest.approx(math.exp(8 / 4)),
        # Not exp((10 / 5 + 1 / 1) / 2), the mean over texts.
        ("perplexity", "wiki"): pytest.approx(math.exp(11 / 6)),
    }


def test_a_choice_must_be_likelier_than_each_wrong_one() -> None:
    questions = {"mmlu": [SINGLE] * 3}
    observed = Observed(BASE, choices=[[[-3.0, -2.0], [-2.0, -3.0], [-2.0, -2.0]]])
    assert values(observed, questions=questions) == {("accuracy", "mmlu"): pytest.approx(1 / 3)}
    # For each character, the second question has -2 against -3/4.
    found = values(observed, questions=questions, length_normalized=True)
    assert found == {("accuracy", "mmlu"): 1.0}


def test_true_choices_share_the_probability() -> None:
    likelihoods = [math.log(0.1), math.log(0.3), math.log(0.2)]
    observed = Observed(BASE, choices=[[likelihoods]])
    assert values(observed, questions={"truth": [TRUTHFUL]}) == {
        ("accuracy", "truth"): 0.0,  # the best one has less than the wrong one
        ("probability of true choices", "truth"): pytest.approx(0.4 / 0.6),
    }


def test_unlikely_choices_do_not_underflow() -> None:
    observed = Observed(BASE, choices=[[[-2000.0, -2001.0, -3000.0]]])
    found = values(observed, questions={"truth": [TRUTHFUL]})
    assert found["probability of true choices", "truth"] == pytest.approx(1.0)
