import pytest

from interventions.strict_json import StrictJSONError, parse_json


def test_json_is_parsed() -> None:
    text = '{"a": [1, 2.5, "\\u20ac \\ud83d\\ude00", null, true]}'
    assert parse_json(text) == {"a": [1, 2.5, "€ 😀", None, True]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "repeats the key 'a'"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ('{"\\udc00": 1}', "not valid Unicode"),
        ('"\ud800"', "not valid Unicode"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("9" * 10_000, "too long"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(StrictJSONError, match=says):
        parse_json(text)
