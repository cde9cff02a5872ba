"""Tests of how a scorer is named ("hf:…", "python:…"), and of the check of scores."""

import math

import pytest

from server.toxicity.scorer import ScorerSpec, ScoringError, check_scores, parse_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", ScorerSpec("none")),
        ("embedded", ScorerSpec("embedded")),
        ("hf:unitary/toxic-bert", ScorerSpec("hf", "unitary/toxic-bert")),
        ("hf:/models/a:b", ScorerSpec("hf", "/models/a:b")),
        ("http:https://h/score?k=1", ScorerSpec("http", "https://h/score?k=1")),
        ("http:http://h:80", ScorerSpec("http", "http://h:80")),
        ("http://[::1]:9/x", ScorerSpec("http", "http://[::1]:9/x")),
        ("https://h", ScorerSpec("http", "https://h")),
        ("python:package.module:score", ScorerSpec("python", "package.module:score")),
    ],
)
def test_specs(text: str, spec: ScorerSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "embedded"),
        ("Embedded", "'Embedded'"),
        ("unitary/toxic-bert", "'unitary/toxic-bert'"),
        ("hf", "'hf'"),
        ("hf:", "names no model"),
        ("hf: ", "names no model"),
        ("http:", "''"),
        ("http:localhost:80/score", "'localhost:80/score'"),
        ("http://", "'http://'"),
        ("http://h:port", "'http://h:port'"),
        ("https:h", "'https:h'"),
        ("http:ftp://h", "'ftp://h'"),
        ("http://[::1", "'http://[::1'"),
        ("python:", "names no function"),
        ("python:module", "names no function"),
        ("python:module:f:g", "names no function"),
        ("python:../module:f", "names no function"),
        ("package.module:f", "'package.module:f'"),
    ],
)
def test_wrong_specs_are_errors_that_show_them(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="the toxicity scorer") as caught:
        parse_spec(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_are_floats_in_their_order() -> None:
    scores = check_scores([0, 1, 0.25], 3)
    assert scores == [0.0, 1.0, 0.25]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    "scores",
    [None, {"a": 1}, [], [0.5], [0.5] * 3, [0.5, "0.5"], [0.5, None], [True, 0.5], [0.5, [0.5]]],
)
def test_what_is_no_list_of_numbers_is_refused(scores: object) -> None:
    with pytest.raises(ScoringError, match="the toxicity scorer"):
        check_scores(scores, 2)


@pytest.mark.parametrize("score", [-0.001, 1.001, math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number_from_0_to_1_is_refused(score: float) -> None:
    with pytest.raises(ScoringError, match="no number from 0 to 1"):
        check_scores([0.5, score], 2)


def test_what_stands_for_a_score_is_not_quoted() -> None:
    with pytest.raises(ScoringError) as caught:
        check_scores([0.5, "my password is x"], 2)
    assert str(caught.value) == "the toxicity scorer gave a str that is no number from 0 to 1"
