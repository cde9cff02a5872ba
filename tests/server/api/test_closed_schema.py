"""Tests of closing JSON schemas."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, grammar_from

from server.api.closed_schema import closed_schema

Json = dict[str, Any]

A: Json = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED: Json = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, CLOSED),
        ({"type": "array", "items": A}, {"type": "array", "items": CLOSED}),
        (
            {"prefixItems": [A, True], "items": False},
            {"prefixItems": [CLOSED, True], "items": False},
        ),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
        (
            {"properties": {"properties": A}},  # a property may have a keyword's name
            {"properties": {"properties": CLOSED}, "additionalProperties": False},
        ),
    ],
)
def test_objects_get_only_the_properties_that_they_declare(schema: Json, expected: Json) -> None:
    assert closed_schema(schema) == expected
    assert LLMatcher.validate_grammar(grammar_from("json_schema", json.dumps(expected))) == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},  # any object, as it says
        {"const": A},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "integer"}},
        {**A, "patternProperties": {"^b": {"type": "integer"}}},
        {**A, "anyOf": [{"required": ["b"]}]},
        {"allOf": [A, {"type": "object", "properties": {"b": {"type": "integer"}}}]},
        {"$ref": "#/$defs/x", "properties": {"b": {}}, "$defs": {"x": A}},
        {"properties": {"c": {"allOf": [A]}}},
    ],
)
def test_other_schemas_stay_as_they_are(schema: Json) -> None:
    assert closed_schema(schema) == schema
