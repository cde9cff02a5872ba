"""Closes JSON schemas: their objects get no properties but those that they declare."""

from collections.abc import Iterator, Mapping
from typing import Final

# Keywords that hold schemas by name, in a list, or alone.
_NAMED: Final = ("properties", "$defs", "definitions")
_LISTED: Final = ("anyOf", "oneOf", "prefixItems")
_SINGLE: Final = ("items",)
# Keywords that add properties, or say already whether there may be others.
_OPENING: Final = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties"),
        *("$ref", "allOf", "anyOf", "oneOf", "if"),
    }
)


def closed_schema(schema: Mapping[str, object]) -> dict[str, object]:
    """Return a schema whose objects have only the properties that they declare.

    Most schemas leave `additionalProperties` out, and mean false: OpenAI demands it of strict
    schemas, xgrammar, the compiler of vLLM, supposes it, and small models add properties until
    they are cut off. Whatever the returned schema accepts, the given one accepts too. It is
    returned as it is where objects are put together by `allOf` or beside a `$ref`, because two
    closed objects together accept nothing.

    Args:
        schema: a JSON schema, nested at most as deep as Python recurses.
    """
    if any("allOf" in each or {"$ref", "properties"} <= each.keys() for each in _inside(schema)):
        return dict(schema)
    return _close(schema)


def _close(schema: Mapping[str, object]) -> dict[str, object]:
    closed = {word: _close_keyword(word, value) for word, value in schema.items()}
    if "properties" in schema and _OPENING.isdisjoint(schema):
        closed["additionalProperties"] = False
    return closed


def _close_keyword(word: str, value: object) -> object:
    if word in _NAMED and isinstance(value, dict):
        return {name: _close_any(each) for name, each in value.items()}
    if word in _LISTED and isinstance(value, list):
        return [_close_any(each) for each in value]
    return _close_any(value) if word in _SINGLE else value


def _close_any(value: object) -> object:
    return _close(value) if isinstance(value, dict) else value


def _inside(schema: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield a schema and all objects in it."""
    yield schema
    waiting: list[object] = list(schema.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
