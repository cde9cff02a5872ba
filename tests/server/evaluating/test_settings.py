"""Tests of how steerings and sweeps are written on the command line."""

import pytest

from server.evaluating import EvaluationInputError
from server.evaluating.settings import BASE, compared, parse_steering, parse_sweep


def test_a_steering_is_json_a_stack_or_a_name() -> None:
    stack = '[{"intervention": "a", "eta": 1}, {"intervention": "b"}]'
    found = [
        parse_steering(text) for text in ("a", '{"intervention": "a", "strength": 0.5}', stack)
    ]
    assert [(each.label, each.steering) for each in found] == [
        ("a", {"intervention": "a"}),
        ("a strength 0.5", {"intervention": "a", "strength": 0.5}),
        ("a eta 1 + b", [{"intervention": "a", "eta": 1}, {"intervention": "b"}]),
    ]
    assert [len(each.items) for each in found] == [1, 1, 2]
    assert len(BASE.items) == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ('{"intervention": "a", "eta": NaN}', "is not JSON"),
        ('{"intervention": "a", "eta": 1e999}', "is not JSON"),
        ('{"intervention": "\\ud83d"}', "is not JSON"),
        ("", "is a name, an object"),
        ("[]", "is a name, an object"),
        ('[{"intervention": "a"}, 3]', "is a name, an object"),
        ('{"strength": 1}', "is a name, an object"),
        ('{"intervention": 3}', "is a name, an object"),
    ],
)
def test_wrong_steerings(text: str, named: str) -> None:
    with pytest.raises(EvaluationInputError, match=named):
        parse_steering(text)


@pytest.mark.parametrize("options", [(["\udcff"], []), ([], ["\udcff:eta=1"])])
def test_bytes_that_are_not_utf_8_are_refused(options: tuple[list[str], list[str]]) -> None:
    with pytest.raises(EvaluationInputError, match="is not UTF-8"):
        compared(*options)


def test_a_sweep_is_a_setting_for_each_value() -> None:
    found = parse_sweep("sha256:ab:iterations=1,2")
    assert [each.steering for each in found] == [
        {"intervention": "sha256:ab", "iterations": 1},
        {"intervention": "sha256:ab", "iterations": 2},
    ]
    assert [each.value for each in parse_sweep("a:strength=0,-0.5,1e-1")] == [0.0, -0.5, 0.1]
    assert {each.curve for each in parse_sweep("a:eta=1,2")} == {"a (eta)"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a:strength", "is NAME:SETTING=VALUE"),
        ("strength=1", "is NAME:SETTING=VALUE"),
        (":strength=1", "is NAME:SETTING=VALUE"),
        ("a:speed=1", "is NAME:SETTING=VALUE"),
        ("a:strength=", "''"),
        ("a:strength=1,x", "'x'"),
        ("a:strength=inf", "not finite"),
    ],
)
def test_wrong_sweeps(text: str, named: str) -> None:
    with pytest.raises(EvaluationInputError, match=named):
        parse_sweep(text)


def test_the_base_comes_first_and_no_steering_twice() -> None:
    found = compared(["a", "a", '{"intervention": "a", "eta": 1}'], ["a:eta=1,2", "b:eta=1"])
    assert [each.label for each in found] == [*("base model", "a", "a eta 1", "a eta 2", "b eta 1")]
    # A point of a sweep stays on its curve, whatever else asks for it.
    assert [each.curve for each in found[2:4]] == ["a (eta)", "a (eta)"]


def test_no_steering_is_taken_for_another() -> None:
    assert [each.steering for each in compared(["base"], [])] == [None, {"intervention": "base"}]
    text = '{"intervention": "a", "eta": "1"}'
    with pytest.raises(EvaluationInputError, match="types of their values"):
        compared([text], ["a:eta=1"])
