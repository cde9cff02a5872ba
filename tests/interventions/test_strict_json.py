"""Tests of `parse_json`, which is stricter than Python's parser and bounds what it builds."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions import strict_json
from interventions.strict_json import JsonLimits, StrictJSONError, UnknownKeyError, parse_json

TIGHT = JsonLimits(containers=3, strings=4, commas=5, members=2, depth=2)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def test_json_is_parsed() -> None:
    text = '{"a": [1, 2.5, "\\u20ac \\ud83d\\ude00", null, true]}'
    assert parse_json(text) == {"a": [1, 2.5, "€ 😀", None, True]}


@given(value=VALUES, escaped=st.booleans())
def test_whatever_json_can_say_is_read_as_it_was_written(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=1 if escaped else None)
    assert parse_json(text) == value


def strictly(text: str) -> object:
    """Parse with Python's `json`; raise ValueError for what it accepts and `parse_json` refuses."""

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    value: object = json.loads(text, object_pairs_hook=members, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()  # lone surrogates
    return value


@given(
    value=VALUES,
    changes=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(["", *'"\\{}[]:, u0a\0'])), max_size=4
    ),
)
def test_near_json_is_read_and_refused_as_by_python(
    value: object, changes: list[tuple[int, str]]
) -> None:
    text = json.dumps({"a": value, 'b"\\': [value]})
    for place, character in changes:
        place %= len(text) + 1
        text = text[:place] + character + text[place + (character == "") :]
    try:
        expected = strictly(text)
    except ValueError:
        with pytest.raises(StrictJSONError):
            parse_json(text)
    else:
        assert parse_json(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "repeats the key 'a'"),
        ('{"a": NaN}', "not valid JSON"),
        ('{"a": -Infinity}', "not valid JSON"),
        ('{"a": 1, "\\u0061": 2}', "repeats the key 'a'"),
        ('[{"a": {"a": 1}, "b": [{"a": 1}], "b": 2}]', "repeats the key 'b'"),
        ('{"\\"": 1, "\\u0022": 2}', "repeats the key '\"'"),
        ('{"\\\\": 1, "\\u005c": 2}', "repeats the key"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"\\udc00": 1}', "not valid JSON"),
        ('"\ud800"', "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a" "b": 1}', "not valid JSON"),
        ('["a": 1]', "not valid JSON"),
        ('"a": 1', "not valid JSON"),
        ("[}]", "not valid JSON"),
        ('{"a": \\"}', "not valid JSON"),
        ('{"a": "b', "not valid JSON"),
        ('{"a\\": 1}', "not valid JSON"),
        ('{"\\x": 1}', "not valid JSON"),
        ("", "not valid JSON"),
        ("9" * 10_000, "number out of range"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(StrictJSONError, match=says):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[],[]]", None),
        ("[[],[],{}]", "more than 3 objects and lists"),
        ('["[", "{[", "]}"]', None),
        ('["\\"[[[[", "\\\\"]', None),
        ('["\\\\", [], [], {}]', "more than 3 objects and lists"),
        ('["", "", "", ""]', None),
        ('["", "", "", "", ""]', "more than 4 strings"),
        ('[1, 2, 3, 4, 5, ",,,"]', None),
        ("[1, 2, 3, 4, 5, 6, 7]", "more than 5 values"),
        ('["a,", ",,\\",,"]', None),
        ('{"a": 1, "b": 2}', None),
        ('{"a": 1, "b": 2, "c": 3}', "more than 2 members"),
        ("[[[]]]", "nested too deeply"),
    ],
)
def test_a_document_is_bounded_by_what_it_holds_beside_its_texts(
    text: str, says: str | None
) -> None:
    if says is None:
        assert parse_json(text, TIGHT) == json.loads(text)
    else:
        with pytest.raises(StrictJSONError, match=says):
            parse_json(text, TIGHT)


def test_our_own_documents_have_no_bounds() -> None:
    text = json.dumps([{str(key): [] for key in range(2000)}] * 20)
    with pytest.raises(StrictJSONError, match="more than"):
        parse_json(text)
    assert parse_json(text, limits=None) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1, "b": {"c": 2}}', None),
        ('{"a": "b\\": ", "\\u0062": 1}', None),
        ("[]", None),
        ('{"c": 1}', "c"),
        ('{"a": {"b": [1]}, "A": 1}', "A"),
        ('{"a\\"": 1}', 'a"'),
        ('{"' + "x" * 5000 + '": 1}', "x" * 5000),
    ],
)
def test_only_known_keys_are_in_the_outermost_object(text: str, key: str | None) -> None:
    if key is None:
        assert parse_json(text, known=("a", "b")) == json.loads(text)
    else:
        with pytest.raises(UnknownKeyError) as caught:
            parse_json(text, known=("a", "b"))
        assert caught.value.key == key
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "[" + ",".join(["[[]]"] * 100_000) + "]",
        '{"a": [' + ",".join(["{}"] * 100_000) + "]}",
        '{"unknown": [' + ",".join(["1"] * 100_000) + "]}",
        "[" + ",".join(['"a"'] * 300_000) + "]",
        "[" + ",".join(["1"] * 600_000) + "]",
        "{" + ",".join(f'"{key}":1' for key in range(2000)) + "}",
    ],
    ids=["lists", "objects", "an unknown key", "strings", "numbers", "members"],
)
def test_nothing_is_built_of_what_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def build(_: str, **__: object) -> object:
        raise AssertionError("it was built")

    monkeypatch.setattr(strict_json, "from_json", build)
    with pytest.raises(StrictJSONError):
        parse_json(text, known=("a",))
